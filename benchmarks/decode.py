"""Times the VAE decode on one rank and on all ranks together (backends/parallel/vae.py).

A part of benchmarks/parallel.py.
"""

import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Mesh
from backends.parallel.vae import attach_patch_decode, detach_patch_decode
from backends.plan import ParallelPlan
from benchmarks.closeness import psnr
from benchmarks.machine import Clock, peak_memory_mb, reset_peak_memory
from benchmarks.models import SEED, sdxl_like_vae


def measure_decode(rank: int, world_size: int, *, side: int, rounds: int) -> dict[str, Any]:
    """Return seconds and memory per decode of `side` x `side` latents, alone and together in turn,
    on every rank.

    Ratios are medians over the rounds. Memory is the largest peak of a rank above what it held
    before; the weights, `weights_mb`, were there.
    """
    vae = sdxl_like_vae()
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(SEED))
    mesh = Mesh(
        ParallelPlan(method="benchmark", axes=(("patch", world_size),)),
        rank=rank,
        device=torch.device("cpu"),
    )
    rows: list[tuple[Clock, list[Clock]]] = []
    alone_mb, together_mb = 0.0, 0.0
    wanted: Tensor | None = None
    try:
        for _ in range(rounds):
            alone, wanted, mb = _decode(vae, latents) if rank == 0 else (None, None, 0.0)
            alone, alone_mb = gather_outcomes((alone, max(mb, alone_mb)))[0]
            mesh.traffic.reset()
            attach_patch_decode(vae, mesh)
            dist.barrier()
            together, got, mb = _decode(vae, latents)
            detach_patch_decode(vae)
            clocks, peaks = zip(*gather_outcomes((together, mb)), strict=True)
            rows.append((alone, list(clocks)))
            together_mb = max(together_mb, *peaks)
    finally:
        mesh.destroy()
    walls = [(alone.wall_s, max(clock.wall_s for clock in together)) for alone, together in rows]
    figures = {
        "latents": list(latents.shape),
        "single_s": round(statistics.median(alone for alone, _ in walls), 4),
        "together_s": round(statistics.median(together for _, together in walls), 4),
        "ratio": round(statistics.median(alone / together for alone, together in walls), 3),
        "ratio_by_best": round(
            min(alone for alone, _ in walls) / min(together for _, together in walls), 3
        ),
        "cpu_ratio": round(
            statistics.median(
                alone.cpu_s / max(clock.cpu_s for clock in together) for alone, together in rows
            ),
            3,
        ),
        "sent_mb": round(mesh.traffic.sent_bytes / 1e6, 3),
        "wait_s": round(mesh.traffic.wait_s, 4),
        "weights_mb": round(sum(weight.nbytes for weight in vae.parameters()) / 1e6, 1),
        "single_mb": alone_mb,
        "together_mb": together_mb,
    }
    if wanted is not None:
        figures |= {
            "psnr_db": psnr(got, wanted),
            "max_difference": float((got - wanted).abs().max()),
        }
    return figures


def _decode(vae: Any, latents: Tensor) -> tuple[Clock, Tensor, float]:
    """Return the time, the pixels, and the peak memory in MB above what this process held."""
    reset_peak_memory()
    before, start = peak_memory_mb(), Clock.now()
    pixels = vae.decode(latents, return_dict=False)[0]
    return Clock.now().since(start), pixels, round(peak_memory_mb() - before, 1)
