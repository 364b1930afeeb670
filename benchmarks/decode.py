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
from benchmarks.machine import Clock
from benchmarks.models import SEED, sdxl_like_vae


def measure_decode(rank: int, world_size: int, *, side: int, rounds: int) -> dict[str, Any]:
    """Return seconds per decode of `side` x `side` latents, alone and together in turn, on every
    rank.

    Ratios are medians over the rounds.
    """
    vae = sdxl_like_vae()
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(SEED))
    mesh = Mesh(
        ParallelPlan(method="benchmark", axes=(("patch", world_size),)),
        rank=rank,
        device=torch.device("cpu"),
    )
    rows: list[tuple[Clock, list[Clock]]] = []
    wanted: Tensor | None = None
    try:
        for _ in range(rounds):
            alone, wanted = _decode(vae, latents) if rank == 0 else (None, None)
            alone = gather_outcomes(alone)[0]
            mesh.traffic.reset()
            attach_patch_decode(vae, mesh)
            dist.barrier()
            together, got = _decode(vae, latents)
            detach_patch_decode(vae)
            rows.append((alone, gather_outcomes(together)))
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
    }
    if wanted is not None:
        figures |= {
            "psnr_db": psnr(got, wanted),
            "max_difference": float((got - wanted).abs().max()),
        }
    return figures


def _decode(vae: Any, latents: Tensor) -> tuple[Clock, Tensor]:
    start = Clock.now()
    pixels = vae.decode(latents, return_dict=False)[0]
    return Clock.now().since(start), pixels
