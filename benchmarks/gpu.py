"""Checks on a real GPU what the tests only rehearse, in ten minutes. One JSON object per line.

    python -m benchmarks.gpu                       # all sections
    python -m benchmarks.gpu facts speed           # some of them
    python -m benchmarks.gpu --device=cpu ranks    # without a GPU, for the logic of this file

Two ranks share the one GPU. NCCL refuses that unless each claims to be another host. Messages then
go through sockets: the order of kernels, hangs and aborts are real, the speed of links is not.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.overrides import TorchFunctionMode

from backends.generation.pipeline import LoadedPipeline
from backends.request import GenerateRequest
from hosts.launch.gpus import RANK_ENVIRONMENT, count_present, driver_version, lowest_capability
from hosts.launch.start_plan import count_gpus
from tests.backends.features import TABLE, request_for
from tests.rehearsal.cases import FAILING_SHORT, PATCH, SEGMENTS, Ranks, offloads, stages
from tests.rehearsal.runs import Rank, distance, load, pixels

SHARED_GPU = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_DEBUG": "WARN",
}
METHODS = (
    Ranks(label="patches", type="sdxl", backend="distrifuser", options=PATCH),
    Ranks(label="segments", type="sdxl", backend="asyncdiff", options=SEGMENTS),
    Ranks(
        label="segments with sharded weights",
        type="sdxl",
        backend="asyncdiff",
        options={**SEGMENTS, "shard_weights": True},
    ),
    Ranks(label="ulysses", type="sd3", backend="xdit", options={"ulysses_degree": 2}),
    Ranks(label="ring", type="flux", backend="xdit", options={"ring_degree": 2}),
    Ranks(label="stages", type="sd3", backend="xdit", options=stages(2, 3)),
    Ranks(label="tensor", type="flux", backend="xdit", options={"tensor_parallel_degree": 2}),
)
FAILING = (
    *FAILING_SHORT,
    METHODS[0],
    METHODS[3],
    Ranks(label="decode", type="sdxl", backend="distrifuser", options=PATCH, fails_in="vae"),
)
METHOD_WITHIN_S = 90.0
STEPS = 3
REPEATS = 6
ROWS = (128, 64)
"""Latent rows of a 1024 x 1024 image: the whole, and the half of one of two ranks."""
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
}
"""Sizes for a CPU."""


def say(section: str, **facts: Any) -> None:
    print(json.dumps({"section": section, **facts}, default=str), flush=True)


def facts(device: torch.device) -> None:
    """Report what the launcher detects, and what is true."""
    memory = os.statvfs("/dev/shm")
    say(
        "facts",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=driver_version(),
        torch_sees=torch.cuda.device_count(),
        launcher_sees=count_gpus(os.environ),
        present=count_present(),
        capability=lowest_capability(),
        shared_memory_mb=memory.f_blocks * memory.f_frsize >> 20,
    )
    if device.type == "cuda":
        say(
            "facts",
            name=torch.cuda.get_device_name(),
            torch_capability=torch.cuda.get_device_capability(),
            nccl=torch.cuda.nccl.version(),
        )


def types(device: torch.device) -> None:
    """Test every model type with previews and image-to-image.

    Does it run, are its numbers finite, how far is it from fp32 on the CPU?
    """
    for name, spec in TABLE.items():
        asked = request_for(spec, num_inference_steps=STEPS)
        expected = pixels(load(spec, torch.device("cpu"), variant="fp32"), asked)
        for variant in ("fp16", "bf16") if device.type == "cuda" else ("fp32",):
            with reporting("types", type=name, variant=variant) as found:
                pipe = load(spec, device, variant=variant)
                image, has_previews = _with_previews(pipe, asked)
                found["off"] = round(distance(image, expected), 3)
                found["has_previews"] = has_previews
                if spec.returns_latents:
                    from_image = {"init_image": image(48), "strength": 0.7}
                    pixels(pipe, request_for(spec, num_inference_steps=STEPS, **from_image))


def _with_previews(pipe: LoadedPipeline, asked: GenerateRequest) -> tuple[torch.Tensor, bool]:
    previews: list[Any] = []
    image = pixels(pipe, asked, on_step=lambda step, n, x: previews.append(pipe.preview(x)))
    return image, all(preview is not None for preview in previews)


def offload(device: torch.device) -> None:
    """Test every way to keep weights in main memory, in half precision."""
    for case in offloads():
        for name in ("sdxl", "flux", "wan_t2v"):
            with reporting("offload", case=case.label, type=name):
                pipe = load(
                    TABLE[name],
                    device,
                    variant="fp16" if device.type == "cuda" else "fp32",
                    **case.load,
                )
                pixels(pipe, request_for(TABLE[name]))


def ranks(device: torch.device) -> None:
    """Test every kind of method on two ranks.

    Does it run over NCCL, and does the image match one rank's?
    """
    for case in METHODS:
        _on_two_ranks(_method, case, device)


def failures(device: torch.device) -> None:
    """Let one rank fail.

    After how many seconds do both know, and does the next job succeed?
    """
    for case in FAILING:
        _on_two_ranks(_failure, case, device)


def _method(case: Ranks, rank: int, device: torch.device) -> None:
    with reporting("ranks", rank=rank, case=case.label, type=case.type) as found:
        here = Rank(case, rank, device)
        image = here.image()
        assert not here.cancelled().groups_are_broken
        found["off_after_cancelling"] = round(distance(here.image(), image), 3)
        found["off_one_rank"] = round(distance(here.alone(), image), 3)


def _failure(case: Ranks, rank: int, device: torch.device) -> None:
    with reporting("failures", rank=rank, case=case.label, type=case.type) as found:
        here = Rank(case, rank, device)
        image = here.image()
        with here.failing(case.fails_in) if rank == 1 else contextlib.nullcontext():
            _, verdict = here.attempt()
        found["told_after_s"] = round(time.time() - verdict.failure.time_s, 2)
        found["cause"] = verdict.failure.message[:120]
        found["off_afterwards"] = round(distance(here.image(), image), 3)


def _on_two_ranks(
    check: Callable[[Ranks, int, torch.device], None], case: Ranks, device: torch.device
) -> None:
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, Path(folder), check, case, device))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + METHOD_WITHIN_S
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        if hung := [rank for rank, process in enumerate(processes) if process.is_alive()]:
            say(
                check.__name__.strip("_"),
                case=case.label,
                error=f"ranks {hung} did not end within {METHOD_WITHIN_S:g} s",
            )
        for process in processes:
            process.kill()
            process.join()


def _rank(
    rank: int, folder: Path, check: Callable[..., None], case: Ranks, device: torch.device
) -> None:
    for name, value in {**RANK_ENVIRONMENT, **SHARED_GPU, "NCCL_HOSTID": f"rank{rank}"}.items():
        os.environ.setdefault(name, value)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    within = timedelta(seconds=METHOD_WITHIN_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=within
    )
    check(case, rank, device)
    os._exit(0)  # a hung kernel would block any other exit


def speed(device: torch.device) -> None:
    """Is a step of SDXL's UNet bound by the host?

    Times it also under a mode like the one that patches use.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    unet = _unet(device, dtype)
    for rows in ROWS if device.type == "cuda" else (32,):
        given = _inputs(rows, device, dtype)
        for mode, context in (
            ("plain", contextlib.nullcontext),
            ("under a function mode", _Passing),
        ):
            times = [_timed(unet, given, context, device) for _ in range(REPEATS)][1:]
            step_ms, host_ms = (
                round(1e3 * statistics.median(each), 1) for each in zip(*times, strict=True)
            )
            say(
                "speed", latent_rows=rows, mode=mode, step_ms=step_ms, host_is_done_after_ms=host_ms
            )


class _Passing(TorchFunctionMode):
    """Intercepts every operator and changes none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _unet(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(**{**SDXL, **(SMALL if device.type == "cpu" else {})})
    return unet.to(dtype).eval().requires_grad_(False)


def _inputs(rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return {
        "sample": random(2, 4, rows, 128),
        "timestep": torch.tensor(500.0, device=device),
        "encoder_hidden_states": random(2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": random(2, 1280), "time_ids": random(2, 6)},
    }


@torch.no_grad()
def _timed(
    unet: nn.Module, given: dict[str, Any], context: Any, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of a call, and those until the host has queued all of it on the device."""
    started = time.perf_counter()
    with context():
        unet(**given)
    host_s = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, host_s


@contextlib.contextmanager
def reporting(section: str, **labels: Any) -> Iterator[dict[str, Any]]:
    """Report the findings and time of a case, or its error. No case stops the others."""
    found: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        yield found
    except Exception as error:  # noqa: BLE001  any error is a finding
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found["at"] = [line.strip() for line in traceback.format_exc().splitlines()[-5:-1]]
    say(section, **labels, **found, seconds=round(time.perf_counter() - started, 1))


SECTIONS = {
    section.__name__: section for section in (facts, types, offload, ranks, failures, speed)
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "sections", nargs="*", help=f"of: {', '.join(SECTIONS)}; all, if none is named"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"{', '.join(sorted(unknown))} is no section. Allowed: {', '.join(SECTIONS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch sees no GPU. Give --device=cpu to try the logic of this file without one."
        )
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    for name in options.sections or SECTIONS:
        with reporting(name, whole_section=True):
            SECTIONS[name](device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
