"""What torch.cuda says and does where the GPUs are rehearsed."""

import contextlib
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.rehearsal.rehearsal import Rehearsal

Replacement = tuple[object, str, object]
"""(owner, name, what takes its place)"""
MEMORY = 24 << 30
COMMUNICATOR_BYTES = 100 << 20
"""What NCCL takes of it for each communicator."""


def replacements(rehearsal: "Rehearsal") -> Iterator[Replacement]:
    yield from _answers(rehearsal)
    yield from _streams(rehearsal)
    yield from _moves(rehearsal)


def _answers(rehearsal: "Rehearsal") -> Iterator[Replacement]:
    """Functions that return the same whatever they are given."""
    facts = {
        "name": "Rehearsed GPU",
        "total_memory": MEMORY,
        "multi_processor_count": 132,
        "gcnArchName": "",
    }
    properties = types.SimpleNamespace(
        major=rehearsal.capability[0], minor=rehearsal.capability[1], **facts
    )
    nothing = (
        "_lazy_init init empty_cache ipc_collect manual_seed manual_seed_all set_rng_state".split()
    )
    nothing += "reset_peak_memory_stats reset_max_memory_allocated".split()
    yes = "is_available is_initialized is_bf16_supported _is_compiled is_tf32_supported".split()
    answers: dict[str, Any] = {
        **dict.fromkeys(nothing),
        **dict.fromkeys(yes, True),
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), 0),
        "device_count": rehearsal.num_devices,
        "get_device_name": properties.name,
        "get_device_capability": rehearsal.capability,
        "get_device_properties": properties,
        "get_arch_list": ["sm_75", "sm_80", "sm_90"],
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_current_stream_capturing": False,
    }
    for name, value in answers.items():
        yield torch.cuda, name, _always(value)
    yield (
        torch.cuda,
        "mem_get_info",
        lambda device=None: (MEMORY - rehearsal.num_communicators * COMMUNICATOR_BYTES, MEMORY),
    )
    yield torch.version, "cuda", "13.0"
    yield torch.backends.cuda, "is_built", _always(True)
    accelerator = {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "device_count": rehearsal.num_devices,
    }
    for name, value in {**accelerator, "empty_cache": None}.items():
        yield torch.accelerator, name, _always(value)


def _streams(rehearsal: "Rehearsal") -> Iterator[Replacement]:
    stream, event = (
        type(kind.__name__, (kind,), {"rehearsal": rehearsal}) for kind in (Stream, Event)
    )
    yield torch.cuda, "Stream", stream
    yield torch.cuda, "Event", event
    for name in ("current_stream", "default_stream"):
        yield torch.cuda, name, _always(stream())
    for name in ("stream", "device"):
        yield torch.cuda, name, _always(contextlib.nullcontext())
    yield (
        torch.cuda,
        "synchronize",
        lambda device=None: rehearsal.host_waits("torch.cuda.synchronize"),
    )


def _moves(rehearsal: "Rehearsal") -> Iterator[Replacement]:
    """'cuda' without a number is the current device, which a CPU build cannot ask for."""
    to = torch.Tensor.to

    def numbered(value: Any) -> Any:
        is_device = isinstance(value, str | torch.device)
        return rehearsal.placement.with_index(torch.device(value)) if is_device else value

    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {
            name: numbered(value) if name == "device" else value for name, value in kwargs.items()
        }
        return to(tensor, *map(numbered, args), **kwargs)

    yield torch.Tensor, "to", move
    yield (
        torch.Tensor,
        "cuda",
        lambda tensor, device=None, **_: move(
            tensor, torch.device("cuda") if device is None else device
        ),
    )

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        rehearsal.journal.pinned_bytes += tensor.numel() * tensor.element_size()
        return tensor

    yield torch.Tensor, "pin_memory", pin
    yield torch.cuda, "current_device", lambda: rehearsal.index
    yield torch.accelerator, "current_device_index", lambda: rehearsal.index
    yield torch.cuda, "set_device", rehearsal.set_device


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value


class Stream:
    """Does nothing but to make the host wait where it is asked to."""

    rehearsal: "Rehearsal"
    cuda_stream = 0
    device = None

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None:
        self.rehearsal.host_waits("stream.synchronize")

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cuda.Event()

    def query(self) -> bool:
        return self.rehearsal.stuck_behind is None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None: ...


class Event:
    """Over at once, unless it was recorded behind a kernel that never ends."""

    rehearsal: "Rehearsal"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_behind = False

    def record(self, stream: Any = None) -> None:
        self._is_behind = self.rehearsal.stuck_behind is not None

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        self.rehearsal.host_waits("event.synchronize", is_behind=self._is_behind)

    def query(self) -> bool:
        return not self._is_behind or self.rehearsal.stuck_behind is None

    def elapsed_time(self, other: Any) -> float:
        return 1.0
