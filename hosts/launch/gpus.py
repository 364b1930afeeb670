"""The GPUs of this machine, asked of NVIDIA's driver without torch, and what torch's and NCCL's
settings should be on them.

NVML (the library behind nvidia-smi) is asked, which is also there under WSL2 and gVisor, where
/proc tells nothing.
"""

import contextlib
import ctypes
import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan

HAS_BF16 = (8, 0)
"""Compute capability from which a card computes in bf16 (Ampere)."""
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
RANK_ENVIRONMENT: Mapping[str, str] = {
    # PipeFusion's receives are posted early and must not hold up what is enqueued after them
    QUEUES: "32",
    # sizes change from job to job, and fixed segments would leave gaps
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # a failed operation is ours to deal with (backends/groups/alarm.py,
    # hosts/supervision/heartbeat.py): torch would end the process a minute later
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    # else it keeps a Python trace of every collective
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
}
"""Defaults for every rank; what the user has set stays."""


def count_present() -> int:
    """NVIDIA's GPUs, whatever CUDA_VISIBLE_DEVICES says."""
    with contextlib.suppress(OSError, AttributeError), _nvml() as library:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
            return count.value
    return len(glob.glob("/proc/driver/nvidia/gpus/*"))


def count_visible(present: int, visible: str | None) -> int:
    """How many of them CUDA shows under this CUDA_VISIBLE_DEVICES: those before the first entry
    that is none, and one MIG slice at most.
    """
    if visible is None:
        return present
    count = 0
    for entry in (part.strip() for part in visible.split(",")):
        if entry.startswith("MIG-"):
            return 1 if present else 0
        is_known = entry.startswith("GPU-") or (entry.isdigit() and int(entry) < present)
        if not is_known or count == present:
            break
        count += 1
    return count


def count_gpus(environment: Mapping[str, str]) -> int:
    """Count the GPUs that the ranks will see, without torch: NVIDIA's, without those that
    CUDA_VISIBLE_DEVICES hides.
    """
    return count_visible(count_present(), environment.get("CUDA_VISIBLE_DEVICES"))


def lowest_capability() -> tuple[int, int] | None:
    """Compute capability of the oldest GPU; None if there is none, or it cannot be told."""
    found: list[tuple[int, int]] = []
    with contextlib.suppress(OSError, AttributeError), _nvml() as library:
        for index in range(count_present()):
            handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            numbers = ctypes.byref(major), ctypes.byref(minor)
            if library.nvmlDeviceGetCudaComputeCapability(handle, *numbers) == 0:
                found.append((major.value, minor.value))
    return min(found, default=None)


def smallest_memory() -> int | None:
    """Bytes of the GPU with the least memory; None if there is none, or it cannot be told."""
    found: list[int] = []
    with contextlib.suppress(OSError, AttributeError), _nvml() as library:
        for index in range(count_present()):
            handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
            library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
                found.append(memory[0])
    return min(found, default=None)


def gpu_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """What `plan_start` must know of this machine."""
    return {
        "num_gpus": count_gpus(environment),
        "capability": lowest_capability(),
        "gpu_memory": smallest_memory(),
    }


def driver_version() -> str:
    """Such as '580.65.06'; 'unknown' if it cannot be read."""
    with contextlib.suppress(OSError, AttributeError), _nvml() as library:
        text = ctypes.create_string_buffer(96)
        if library.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
    return "unknown"


def default_variant(
    spec: ModelSpec, *, num_gpus: int, capability: tuple[int, int] | None
) -> tuple[str, str]:
    """The numbers to compute in where the launch names none, and why. capability: of the oldest
    GPU, if it is known.
    """
    if not num_gpus:
        return "fp32", "no GPU"
    if spec.variant != "bf16":
        return "fp16", "GPUs are there"
    if capability is None or capability >= HAS_BF16:
        return "bf16", f"type {spec.name!r} is published in it"
    version = ".".join(map(str, capability))
    why = (
        f"type {spec.name!r} is published in bf16, which a GPU of compute capability {version} "
        "lacks: try fp32 if images are black"
    )
    return "fp16", why


def require_queues(plan: ParallelPlan, environment: Mapping[str, str]) -> None:
    """ConfigError where stages would wait for each other in one hardware queue."""
    if plan.degree("stage") > 1 and environment.get(QUEUES) == "1":
        raise ConfigError(
            f"{QUEUES}=1 is set, with which the {plan.degree('stage')} stages of {plan.method} "
            "would hang: their kernels wait for each other. Allowed: 2 and more. Unset it, or "
            "choose a method without stages."
        )


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """OSError without the library, or if its driver does not answer."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    if library.nvmlInit_v2() != 0:
        raise OSError("NVML does not answer")
    try:
        yield library
    finally:
        library.nvmlShutdown()
