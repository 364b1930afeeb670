"""The band decode equals the single decode: image and video VAEs, even and uneven bands, tiles, several sizes."""

from typing import Any

import pytest
import torch

from backends import hooks
from backends.distributed import Mesh
from backends.plan import ParallelPlan
from backends.vae import attach_band_decode, detach_band_decode
from tests.checkpoints import checkpoint, load


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    frames = {} if vae.config.get("norm_num_groups") else {"num_frames": latents.shape[0]}  # the video VAE has no such field
    return vae.decode(latents, return_dict=False, **frames)[0]


def mesh_of(rank: int, *axes: tuple[str, int]) -> Mesh:
    return Mesh(ParallelPlan(method="test", axes=axes), rank=rank, device=torch.device("cpu"))


@torch.no_grad()
def check_decodes(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("patch", world_size))
    for name, channels in (("sdxl", 4), ("sd3", 16), ("sdup", 4), ("svd", 4)):
        vae = load(name).vae
        for rows, columns in ((8, 8), (9, 6)):
            latents = torch.randn(2, channels, rows, columns)
            want = decode(vae, latents)
            attach_band_decode(vae, mesh)
            got = decode(vae, latents)
            detach_band_decode(vae)
            assert mesh.traffic.messages > 0
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
            mesh.traffic.reset()
    mesh.destroy()


@pytest.mark.parametrize("world_size", [2, 3])
def test_band_decode_matches_the_single_decode(run_on_ranks, world_size):
    for name in ("sdxl", "sd3", "sdup", "svd"):
        checkpoint(name)
    run_on_ranks(check_decodes, world_size)


@torch.no_grad()
def check_tiles_and_axes(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("cfg", 2), ("patch", 1))
    vae = load("sdxl").vae
    vae.enable_tiling()
    latents = torch.randn(1, 4, 12, 12)
    want = decode(vae, latents)
    attach_band_decode(vae, mesh)
    torch.testing.assert_close(decode(vae, latents), want, rtol=0, atol=2e-5)
    assert mesh.traffic.messages > 0
    single_row = torch.randn(1, 4, 1, 12)
    mesh.traffic.reset()
    decode(vae, single_row)  # too few rows to share: whole on every rank
    assert mesh.traffic.messages == 0
    detach_band_decode(vae)
    assert not any(hooks.attached(module) for module in vae.modules())
    mesh.destroy()


def test_band_decode_shares_tiles_over_all_axes_and_leaves_the_vae_as_it_was(run_on_ranks):
    checkpoint("sdxl")
    run_on_ranks(check_tiles_and_axes, 2)


def test_one_rank_decodes_without_any_hook():
    vae = load("sdxl").vae
    attach_band_decode(vae, mesh_of(0, ("patch", 1)))
    assert hooks.attached(vae.decoder) == []
