"""Seconds per step, bytes and closeness of a backend's settings on N ranks of one thread each,
against one rank in the same run.

    python -m benchmarks.parallel --backend distrifuser --model unet --blocks 4 > result.json

In each round the first rank runs the loop alone as the reference, while the others wait. Then every
setting runs on all ranks. Between its steady steps a single rank runs steps of its own
(benchmarks/neighbour.py), so `step_ratio` compares adjacent steps. The VAE decode is timed against
one rank in the same round. `busy_cores` counts all processes of the machine. If it exceeds the
ranks' own, the figures are disturbed; `cpu_ratio` (CPU seconds of one rank alone over those of
one of several) estimates undisturbed ones.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from backends import BACKEND_NAMES, backend_class, planner
from backends.errors import HostError
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import CommStats, Mesh
from backends.model_table import read_table
from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from benchmarks.closeness import psnr
from benchmarks.decode import measure_decode
from benchmarks.machine import Clock, peak_memory_mb, reset_peak_memory
from benchmarks.models import SUBJECTS, Subject, num_parameters
from benchmarks.neighbour import BLOCK, Neighbour, serve
from benchmarks.profile import profiled
from benchmarks.settings import SETTINGS


def main() -> None:
    arguments = _arguments()
    spawning = mp.get_context("spawn")
    ours, theirs = spawning.Pipe()
    neighbour = spawning.Process(target=serve, args=(arguments.model, theirs), daemon=True)
    neighbour.start()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (arguments, folder, ours), nprocs=arguments.ranks, start_method="spawn"
        )
        print(Path(folder, "result.json").read_text())
    ours.send(None)
    neighbour.join()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend", choices=[name for name in BACKEND_NAMES if name != "single"], required=True
    )
    parser.add_argument("--model", choices=[*SUBJECTS], default="unet")
    parser.add_argument(
        "--settings",
        type=lambda text: text.split(","),
        help="names from benchmarks/settings.py, with commas; all if left out",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--blocks",
        type=int,
        default=3,
        help=f"{BLOCK} steady steps of each loop, of which all but the first count",
    )
    parser.add_argument(
        "--warmup_steps", type=int, default=4, help="synchronous steps of each loop"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="add where the time of one more steady step goes, by class of operator",
    )
    parser.add_argument(
        "--decode_side",
        type=int,
        default=64,
        help="side of the latents for the VAE decode; 0 leaves it out",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.settings or ()) - set(SETTINGS[arguments.backend]):
        parser.error(
            f"--settings: {', '.join(sorted(unknown))}. Allowed with {arguments.backend}: "
            f"{', '.join(SETTINGS[arguments.backend])}."
        )
    arguments.steps = arguments.warmup_steps + 1 + BLOCK * arguments.blocks
    return arguments


def _rank(rank: int, arguments: argparse.Namespace, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=arguments.ranks
    )
    try:
        with torch.no_grad():
            result = measure(rank, arguments, Neighbour(connection) if rank == 0 else None)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result, indent=2))
    finally:
        dist.destroy_process_group()


def measure(
    rank: int, arguments: argparse.Namespace, neighbour: Neighbour | None
) -> dict[str, Any]:
    """Run all rounds and return the same result on every rank. neighbour: on rank 0."""
    subject = SUBJECTS[arguments.model]()
    settings = SETTINGS[arguments.backend]
    names = arguments.settings or list(settings)
    rounds: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for _ in range(arguments.rounds):
        figures, latents = _alone(rank, subject, arguments)
        reference = latents if latents is not None else reference
        row = {"single": figures}
        for name in names:
            row[name] = _together(rank, subject, settings[name], arguments, reference, neighbour)
            _tell(
                rank,
                name,
                row[name].get("refused")
                or f"{row[name]['step_ratio']:.2f} x per step, {row[name]['cpu_ratio']:.2f} by CPU",
            )
        rounds.append(row)
    summary = {name: _summary(rounds, name) for name in ["single", *names]}
    result = {"machine": _machine(subject, arguments), "settings": summary, "rounds": rounds}
    if arguments.decode_side:
        result["vae_decode"] = measure_decode(
            rank, arguments.ranks, side=arguments.decode_side, rounds=arguments.rounds
        )
        _tell(rank, "vae_decode", f"{result['vae_decode']['ratio']:.2f} x")
    return result


def _alone(
    rank: int, subject: Subject, arguments: argparse.Namespace
) -> tuple[dict[str, Any], Tensor | None]:
    """Run the loop on rank 0 while the others wait without using the CPU.

    Every rank gets the figures, rank 0 also the latents.
    """
    result = _loop(subject, arguments, step_done=lambda: None) if rank == 0 else None
    figures = gather_outcomes(result[0] if result else None)[0]
    return figures, result[1] if result else None


def _together(
    rank: int,
    subject: Subject,
    options: dict[str, Any],
    arguments: argparse.Namespace,
    reference: Tensor | None,
    neighbour: Neighbour | None,
) -> dict[str, Any]:
    """Run one setting on all ranks. A refusal of its plan is a result, too."""
    spec = read_table()[subject.model_type]
    try:
        plan = planner(arguments.backend)(
            spec, {"warm_up_steps": arguments.warmup_steps, **options}, arguments.ranks
        )
    except HostError as error:
        return {"refused": str(error)}
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = backend_class(arguments.backend)(spec=spec, plan=plan, mesh=mesh)
    try:
        backend.attach(subject.pipe)
    except HostError as error:
        mesh.destroy()
        return {"refused": str(error)}
    size = subject.sample.shape[-1] * 8
    request = GenerateRequest(
        num_inference_steps=arguments.steps, guidance_scale=5.0, warmup_steps=arguments.warmup_steps
    )
    run = RunInfo(request=request, height=size, width=size, num_inference_steps=arguments.steps)
    try:
        backend.check(run)
        mesh.traffic.reset()
        backend.begin(run)
        figures, latents = _loop(
            subject,
            arguments,
            step_done=backend.step_done,
            traffic=mesh.traffic,
            neighbour=neighbour,
        )
        figures["report"] = dict(backend.report())
    except HostError as error:
        return {"refused": str(error)}
    finally:
        backend.end()
        backend.detach(subject.pipe)
        mesh.destroy()
    if rank == 0:
        figures |= closeness(latents, reference)
    figures["plan"] = plan.describe()
    ranks = gather_outcomes(figures)
    keys = ("steady_cpu_s", "peak_memory_mb", "steady_sent_mb", "steady_wait_s")
    return ranks[0] | {f"{key}_by_rank": [figures[key] for figures in ranks] for key in keys}


def closeness(latents: Tensor, reference: Tensor) -> dict[str, float]:
    return {
        "psnr_db": psnr(latents, reference),
        "max_difference": float((latents - reference).abs().max()),
    }


def _loop(
    subject: Subject,
    arguments: argparse.Namespace,
    *,
    step_done: Callable[[], None],
    traffic: CommStats | None = None,
    neighbour: Neighbour | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Run one generation. Figures are medians over the steady steps, after the synchronous ones.

    traffic: with several ranks.
    """
    scheduler, sample = subject.pipe.scheduler, subject.sample
    scheduler.set_timesteps(arguments.steps)
    is_shared, traffic = traffic is not None, traffic or CommStats()
    reset_peak_memory()
    first_steady = arguments.warmup_steps + 1  # the step before may still allocate buffers
    steps: list[dict[str, float]] = []
    for number, timestep in enumerate(scheduler.timesteps):
        if is_shared and (
            number == 0 or (number >= first_steady and (number - first_steady) % BLOCK == 0)
        ):
            _let_neighbour_step(neighbour if number else None)
        before, sent, waited = Clock.now(), traffic.sent_bytes, traffic.wait_s
        sample = scheduler.step(
            subject.predict(sample, timestep), timestep, sample, return_dict=False
        )[0]
        step_done()
        if (number - first_steady) % BLOCK == BLOCK - 1 or number + 1 == first_steady:
            # a block ends when all its data has arrived; some methods return pending tensors
            sample.isfinite().all().item()
        used = Clock.now().since(before)
        steps.append(
            {
                "wall_s": used.wall_s,
                "cpu_s": used.cpu_s,
                "busy_s": used.busy_s,
                "sent": traffic.sent_bytes - sent,
                "wait_s": traffic.wait_s - waited,
            }
        )
    steady = steps[first_steady:]
    figures: dict[str, Any] = {}
    if is_shared:
        _let_neighbour_step(neighbour)
        figures |= (
            neighbour.ratios([(step["wall_s"], step["cpu_s"]) for step in steady])
            if neighbour is not None
            else {}
        )
    if arguments.profile:
        figures["profile_ms"] = profiled(lambda: (subject.predict(sample, timestep), step_done()))
    busy_s, wall_s = (sum(step[key] for step in steps) for key in ("busy_s", "wall_s"))
    figures |= {
        "loop_s": round(wall_s, 3),
        "steady_step_s": _median(steady, "wall_s"),
        "steady_cpu_s": _median(steady, "cpu_s"),
        "steady_wait_s": _median(steady, "wait_s"),
        "steady_sent_mb": round(statistics.median(step["sent"] for step in steady) / 1e6, 3),
        "busy_cores": round(busy_s / wall_s, 2),
        "peak_memory_mb": peak_memory_mb(),
    }
    return figures, sample


def _let_neighbour_step(neighbour: Neighbour | None) -> None:
    """Run a reference step on rank 0, then let all ranks go on together."""
    if neighbour is not None:
        neighbour.step()
    dist.barrier()


def _median(steps: list[dict[str, float]], key: str) -> float:
    return round(statistics.median(step[key] for step in steps), 4)


def _summary(rounds: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return medians over the rounds."""
    rows = [(row[name], row["single"]) for row in rounds if "refused" not in row[name]]
    if not rows:
        return {"refused": rounds[0][name]["refused"]}
    values = {
        key: [row[key] for row, _ in rows]
        for key in ("step_ratio", "cpu_ratio", "busy_cores", "steady_step_s")
        if key in rows[0][0]
    }
    values["loop_ratio"] = [single["loop_s"] / row["loop_s"] for row, single in rows]
    result = {key: round(statistics.median(numbers), 3) for key, numbers in values.items()}
    kept = (
        "plan",
        "psnr_db",
        "profile_ms",
        "max_difference",
        "steady_sent_mb_by_rank",
        "steady_wait_s_by_rank",
        "steady_cpu_s_by_rank",
    )
    return result | {
        key: rows[-1][0][key] for key in (*kept, "peak_memory_mb_by_rank") if key in rows[-1][0]
    }


def _machine(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    spec = read_table()[subject.model_type]
    return {
        "backend": arguments.backend,
        "model": (
            f"{arguments.model}, "
            f"{num_parameters(getattr(subject.pipe, spec.denoiser)) / 1e6:.1f} M parameters"
        ),
        "latents": list(subject.sample.shape),
        "ranks": arguments.ranks,
        "steps": arguments.steps,
        "warmup_steps": arguments.warmup_steps,
        "rounds": arguments.rounds,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def _tell(rank: int, name: str, text: str) -> None:
    if rank == 0:
        print(f"{name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
