"""Host time of a step: what each parallel method adds to the launches of plain diffusers.

    python -m benchmarks.host_time > host_time.json

The networks are as deep as SDXL, SD3 and FLUX.1 and have hardly any arithmetic
(benchmarks/models.py), so a step takes as long as its launches do. On a fast GPU, whose host is the
limit, a method with a ratio above 1 is slower than one rank however well it divides the arithmetic.

Each method runs in blocks of steps on ranks of one thread. Before and after each block rank 0 runs
as many plain steps of a second copy of the network, while the others wait without using the CPU.
`ratio` is the method's seconds over those of its two neighbours, the median over the blocks; `best`
is the smallest. `cpu_ratio` compares the CPU time of rank 0's main thread: it leaves out waiting,
and other programs on a busy machine. `threads_ms` is the CPU time of the rank's other threads.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from backends import backend_class, planner
from backends.groups.mesh import CommStats, Mesh
from backends.model_table import read_table
from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from benchmarks.models import DEEP, Subject
from benchmarks.settings import SETTINGS

WARMUP_STEPS = 2
METHODS: dict[str, tuple[tuple[str, str], ...]] = {
    "deep_unet": (
        ("distrifuser", "cfg_split"),
        ("distrifuser", "corrected_async_gn"),
        ("distrifuser", "full_sync"),
        ("asyncdiff", "segments_2_1"),
    ),
    "deep_sd3": (
        ("xdit", "cfg"),
        ("distrifuser", "corrected_async_gn"),
        ("distrifuser", "full_sync"),
        ("xdit", "ulysses"),
        ("xdit", "ring"),
        ("xdit", "pipefusion"),
        ("asyncdiff", "segments_2_1"),
    ),
    "deep_flux": (
        ("distrifuser", "corrected_async_gn"),
        ("distrifuser", "full_sync"),
        ("xdit", "ulysses"),
        ("xdit", "ring"),
        ("xdit", "pipefusion"),
        ("asyncdiff", "segments_2_1"),
    ),
}
"""Network -> (backend, name in benchmarks/settings.py) of what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Seconds of one step: the mean over a block, without the block's first step."""

    wall_s: float
    cpu_s: float  # of the main thread
    threads_s: float  # CPU time of the process's other threads


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (arguments, folder), nprocs=arguments.ranks, start_method="spawn")
        print(Path(folder, "result.json").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*DEEP], help="all if left out")
    parser.add_argument("--methods", help="names from benchmarks/settings.py, with commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of each block")
    return parser.parse_args()


def _rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=arguments.ranks
    )
    try:
        with torch.no_grad():
            models = [arguments.model] if arguments.model else [*DEEP]
            networks = {name: _network(rank, name, arguments) for name in models}
        if rank == 0:
            result = {"machine": _machine(arguments), "networks": networks}
            Path(folder, "result.json").write_text(json.dumps(result, indent=2))
    finally:
        dist.destroy_process_group()


def _network(rank: int, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every method of one network."""
    asked = arguments.methods.split(",") if arguments.methods else None
    plain, shared = DEEP[name](), DEEP[name]()
    figures = {}
    for backend, setting in METHODS[name]:
        if asked is None or setting in asked:
            row = _method(rank, plain, shared, backend, SETTINGS[backend][setting], arguments)
            figures[setting] = row
            if rank == 0:
                text = ", ".join(f"{key} {value}" for key, value in row.items())
                print(f"{name} {setting}: {text}", file=sys.stderr, flush=True)
    return figures


def _method(
    rank: int,
    plain: Subject,
    shared: Subject,
    backend_name: str,
    options: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    spec = read_table()[shared.model_type]
    plan = planner(backend_name)(spec, {"warmup_steps": WARMUP_STEPS, **options}, arguments.ranks)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = backend_class(backend_name)(spec=spec, plan=plan, mesh=mesh)
    backend.attach(shared.pipe)
    steps = WARMUP_STEPS + 2 + arguments.blocks * arguments.steps
    request = GenerateRequest(num_inference_steps=steps, warmup_steps=WARMUP_STEPS)
    try:
        backend.begin(RunInfo(request=request, height=128, width=128, num_inference_steps=steps))
        blocks = _blocks(rank, plain, shared, backend.step_done, mesh.traffic, arguments)
    finally:
        backend.end()
        backend.detach(shared.pipe)
        mesh.destroy()
    return blocks


def _blocks(
    rank: int,
    plain: Subject,
    shared: Subject,
    step_done: Callable[[], None],
    traffic: CommStats,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Run all blocks of one method between plain blocks. Figures are of rank 0."""
    run = _Loop(shared, steps=arguments.steps * arguments.blocks + WARMUP_STEPS + 2, done=step_done)
    run.block(WARMUP_STEPS + 2)  # buffers are allocated after the last synchronous step
    traffic.reset()
    alone = _Loop(plain, steps=arguments.steps * (arguments.blocks + 1), done=lambda: None)
    before = alone.block(arguments.steps) if rank == 0 else None
    rows: list[tuple[Block, Block, Block]] = []
    for _ in range(arguments.blocks):
        dist.barrier()
        this = run.block(arguments.steps)
        if rank == 0:
            after = alone.block(arguments.steps)
            rows.append((before, this, after))
            before = after
    num_steps = arguments.blocks * arguments.steps
    return _figures(rows, traffic, num_steps) if rank == 0 else {}


def _figures(
    rows: list[tuple[Block, Block, Block]], traffic: CommStats, num_steps: int
) -> dict[str, float]:
    ratios = [2 * this.wall_s / (before.wall_s + after.wall_s) for before, this, after in rows]
    by_cpu = [2 * this.cpu_s / (before.cpu_s + after.cpu_s) for before, this, after in rows]
    figures = {
        "ratio": statistics.median(ratios),
        "best": min(ratios),
        "cpu_ratio": statistics.median(by_cpu),
        "step_ms": 1e3 * statistics.median(this.wall_s for _, this, _ in rows),
        "plain_ms": 1e3 * statistics.median(before.wall_s for before, _, _ in rows),
        "threads_ms": 1e3 * statistics.median(this.threads_s for _, this, _ in rows),
        "wait_ms": 1e3 * traffic.wait_s / num_steps,
        "messages": traffic.messages / num_steps,
    }
    return {name: round(value, 3) for name, value in figures.items()}


class _Loop:
    """A denoising loop that is run block by block."""

    def __init__(self, subject: Subject, *, steps: int, done: Callable[[], None]) -> None:
        self._subject, self._done = subject, done
        self._sample = subject.sample
        subject.pipe.scheduler.set_timesteps(steps)
        self._timesteps = list(subject.pipe.scheduler.timesteps)

    def block(self, steps: int) -> Block:
        """Run some steps, the last of them up to complete latents, and time all but the first."""
        self._step()  # pending messages of the last block had time to arrive
        wall_s, cpu_s, all_s = time.perf_counter(), time.thread_time(), time.process_time()
        for _ in range(steps - 1):
            self._step()
        self._sample.isfinite().all().item()  # some methods return pending tensors
        ours = time.thread_time() - cpu_s
        return Block(
            wall_s=(time.perf_counter() - wall_s) / (steps - 1),
            cpu_s=ours / (steps - 1),
            threads_s=(time.process_time() - all_s - ours) / (steps - 1),
        )

    def _step(self) -> None:
        timestep = self._timesteps.pop(0)
        noise = self._subject.predict(self._sample, timestep)
        scheduler = self._subject.pipe.scheduler
        self._sample = scheduler.step(noise, timestep, self._sample, return_dict=False)[0]
        self._done()


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "ranks": arguments.ranks,
        "blocks": arguments.blocks,
        "steps": arguments.steps,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
