"""Selects the device of a rank.

A GPU that is present but unusable is an error: a rank never falls back to the CPU silently.
"""

import logging

import torch

from backends.errors import ConfigError

logger = logging.getLogger(__name__)

OLDER_CUDA = "https://download.pytorch.org/whl/cu126"
"""torch build for drivers from 560 and GPUs from compute capability 5.0."""


def select_device(
    local_rank: int, *, local_world_size: int = 1, num_gpus: int = 0, driver: str = "unknown"
) -> torch.device:
    """Return this rank's CUDA device, or the CPU on a machine without GPUs.

    num_gpus: number of GPUs that the driver shows to the ranks of this machine. ConfigError if
    torch can use fewer GPUs than there are ranks.
    """
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus and not usable:
        raise ConfigError(
            f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) can use none of this "
            f"machine's {num_gpus} GPU(s) with driver "
            f"{driver}. {_advice()}"
        )
    if not usable:
        _warn_of_other_accelerators()
        return torch.device("cpu")
    if local_world_size > usable:
        raise ConfigError(
            f"{local_world_size} ranks are started on this machine, but torch sees {usable} "
            f"GPU{'s' if usable > 1 else ''} (a process sees "
            f"one MIG slice at most). Start --nproc_per_node={usable}."
        )
    device = torch.device("cuda", local_rank)
    _require_kernels(device, driver)
    torch.cuda.set_device(device)
    return device


def _require_kernels(device: torch.device, driver: str) -> None:
    """Raise ConfigError if the GPU is older than every architecture of this torch build."""
    built_for = [
        int(arch.removeprefix("sm_"))
        for arch in torch.cuda.get_arch_list()
        if arch.removeprefix("sm_").isdigit()
    ]
    major, minor = torch.cuda.get_device_capability(device)
    if built_for and torch.version.hip is None and major * 10 + minor < min(built_for):
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, but "
            f"torch {torch.__version__} has kernels from "
            f"{min(built_for) / 10:g} on (driver {driver}). {_advice()}"
        )


def _advice() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "Install torch with CUDA (pip install torch, driver 580 or newer), or hide the GPUs "
            "with CUDA_VISIBLE_DEVICES= ."
        )
    return (
        "Update the driver (CUDA 13 needs 580 or newer), or install torch for older drivers and "
        "GPUs: pip install torch --index-url "
        f"{OLDER_CUDA}. To use the CPU, hide the GPUs with CUDA_VISIBLE_DEVICES= ."
    )


def _warn_of_other_accelerators() -> None:
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        logger.warning(
            "the %s device of this machine is not used: only CUDA and ROCm are supported, so the "
            "ranks run on the CPU",
            kind,
        )
