"""The checks of benchmarks/gpu.py: what is tried on a GPU, and what is reported of it."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from backends.autotune.trials import Trials
from hosts.launch.gpus import count_gpus, count_present, driver_version, lowest_capability
from tests.backends.features import TABLE, request_for
from tests.checkpoints import sample_image
from tests.rehearsal.case import Ranks
from tests.rehearsal.cases import FAILING_LONG, FAILING_SHORT, LONG, SHORT
from tests.rehearsal.one_rank_cases import offloads
from tests.rehearsal.rehearsal import Rehearsal
from tests.rehearsal.runs import Rank, distance, largest_distance, load, pixels

Kind = Literal["cuda", "rehearsed", "cpu"]
METHODS = (
    "patches",
    "segments",
    "segments with sharded weights",
    "ulysses",
    "ring",
    "stages",
    "tensor of flux",
    "ulysses, divided weights",
    "methods that change",
)
HYBRIDS = ("cfg x patch", "four segments", "cfg x stages", "ulysses x ring")
"""With four GPUs. Labels of tests/rehearsal/cases.py, as in METHODS."""
FAILING = ("patches under ddim", "patches", "ulysses", "decode of sdxl")
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


@dataclass(frozen=True, slots=True)
class Place:
    """What the checks run on. num_gpus: of this machine, or as many as are rehearsed.
    check_within_s: a check that takes longer hangs.
    """

    kind: Kind
    num_gpus: int
    check_within_s: float

    @property
    def is_real(self) -> bool:
        return self.kind == "cuda"

    @contextlib.contextmanager
    def device(self, rank: int = 0) -> Iterator[torch.device]:
        """This process's device."""
        index = rank % max(1, self.num_gpus)
        with contextlib.ExitStack() as stack:
            if self.kind == "rehearsed":
                stack.enter_context(Rehearsal(num_devices=self.num_gpus, index=index))
            if self.kind == "cpu":
                torch.set_num_threads(1)
                yield torch.device("cpu")
                return
            torch.cuda.set_device(index)
            yield torch.device("cuda", index)


Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the result. ranks: processes that run it together."""

    section: str
    run: Callable[..., Found]
    """run(device, *args), with several ranks run(device, rank, *args)."""
    args: tuple[Any, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1


def checks(place: Place) -> Iterator[Check]:
    """All of them, the most telling first."""
    yield Check(section="facts", run=facts)
    for rows in ROWS if place.is_real else (32,):
        for is_under_mode in (False, True):
            labels = {"latent_rows": rows, "under_function_mode": is_under_mode}
            yield Check(section="speed", run=speed, args=(rows, is_under_mode), labels=labels)
    yield Check(section="links", run=links, ranks=2 if place.num_gpus < 4 else 4)
    methods = METHODS if place.num_gpus < 4 else (*METHODS, *HYBRIDS)
    for section, run, names in (("ranks", method, methods), ("failures", failure, FAILING)):
        for name in names:
            case = _case(name)
            labels = {"case": case.label, "type": case.type}
            yield Check(section=section, run=run, args=(case,), labels=labels, ranks=case.ranks)
    for name in TABLE:
        for variant in ("fp16", "bf16") if place.is_real else ("fp32",):
            labels = {"type": name, "variant": variant}
            yield Check(section="types", run=one_type, args=(name, variant), labels=labels)
    for name in ("sdxl", "flux", "wan_t2v"):
        for case in offloads(TABLE[name]):
            labels = {"case": case.label, "type": name}
            yield Check(section="offload", run=offload, args=(name, case), labels=labels)


def _case(label: str) -> Ranks:
    return next(
        case for case in (*SHORT, *LONG, *FAILING_SHORT, *FAILING_LONG) if case.label == label
    )


SECTIONS = ("facts", "speed", "links", "ranks", "failures", "types", "offload")


def facts(device: torch.device) -> Found:
    """What the launcher detects, and what is true."""
    memory = os.statvfs("/dev/shm")
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "torch_sees": torch.cuda.device_count(),
        "launcher_sees": count_gpus(os.environ),
        "present": count_present(),
        "capability": lowest_capability(),
        "shared_memory_mb": memory.f_blocks * memory.f_frsize >> 20,
    }
    if device.type == "cuda":
        found["name"] = torch.cuda.get_device_name()
        found["torch_capability"] = torch.cuda.get_device_capability()
        found["memory_mb"] = torch.cuda.mem_get_info()[1] >> 20
        if dist.is_nccl_available() and hasattr(torch._C, "_nccl_version"):
            found["nccl"] = torch.cuda.nccl.version()
    return found


def one_type(device: torch.device, name: str, variant: str) -> Found:
    """A model type with previews and image-to-image: are its numbers finite, and how far is it from
    fp32 on the CPU, of 255?
    """
    spec = TABLE[name]
    asked = request_for(spec, num_inference_steps=STEPS)
    expected = pixels(load(name, torch.device("cpu"), variant="fp32"), asked)
    pipe = load(name, device, variant=variant)
    previews: list[Any] = []
    image = pixels(pipe, asked, on_step=lambda step, n, x: previews.append(pipe.preview(x)))
    if spec.returns_latents:
        from_image = {"init_image": sample_image(48), "strength": 0.7}
        pixels(pipe, request_for(spec, num_inference_steps=STEPS, **from_image))
    has_previews = all(preview is not None for preview in previews)
    return {"off": round(distance(image, expected), 3), "has_previews": has_previews}


def offload(device: torch.device, name: str, case: Any) -> Found:
    """A way to keep weights in main memory, in half precision."""
    pipe = load(name, device, variant="fp16" if device.type == "cuda" else "fp32", **case.load)
    pixels(pipe, request_for(TABLE[name]))
    return {}


def links(device: torch.device, rank: int) -> Found:
    """What the planner measures between ranks: also what NCCL takes for a communicator."""
    subject: Any = SimpleNamespace(device=device)
    world_size = dist.get_world_size()
    trials = Trials(subject, spec=TABLE["sd3"], rank=rank, world_size=world_size, halves=2)
    started = time.perf_counter()
    link = trials.link()
    return {
        "opened_and_measured_s": round(time.perf_counter() - started, 2),
        "latency_us": round(1e6 * link.latency_s, 1),
        "gb_per_s": round(link.bytes_per_s / 1e9, 2),
        "communicator_mb": link.communicator_bytes >> 20,
    }


def method(device: torch.device, rank: int, case: Ranks) -> Found:
    """A method on several ranks: does it run over NCCL, and is the image one rank's?"""
    here = Rank(case, rank, device)
    images = here.images()
    assert not here.cancelled().groups_are_broken
    return {
        "off_after_cancelling": round(largest_distance(here.images(), images), 3),
        "off_one_rank": round(distance(here.alone(), images[0]), 3),
    }


def failure(device: torch.device, rank: int, case: Ranks) -> Found:
    """One rank fails: after how many seconds does this one know, and does the next job succeed?"""
    here = Rank(case, rank, device)
    images = here.images()
    fails = here.failing(case.fails_in) if rank == case.ranks - 1 else contextlib.nullcontext()
    with fails:
        _, outcome = here.attempt()
    told_after_s = time.time() - outcome.failure.time_s
    return {
        "told_after_s": round(told_after_s, 2),
        "cause": outcome.failure.message[:120],
        "off_afterwards": round(largest_distance(here.images(), images), 3),
    }


def speed(device: torch.device, rows: int, is_under_mode: bool) -> Found:
    """Is a step of SDXL's UNet bound by the host? Also under a mode like the one that patches use
    in their first call.
    """
    is_small = rows not in ROWS
    dtype = torch.float32 if is_small else torch.float16
    unet, given = _unet(device, dtype, is_small=is_small), _inputs(rows, device, dtype)
    context = _Passing if is_under_mode else contextlib.nullcontext
    times = [_timed(unet, given, context, device) for _ in range(REPEATS)][1:]
    step_ms, host_ms = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
    return {"step_ms": round(step_ms, 1), "host_is_done_after_ms": round(host_ms, 1)}


class _Passing(TorchFunctionMode):
    """Intercepts every operator and changes none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _unet(device: torch.device, dtype: torch.dtype, *, is_small: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**{**SDXL, **(SMALL if is_small else {})})
    return unet.to(device, dtype).eval().requires_grad_(False)


def _inputs(rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype).to(device)

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
