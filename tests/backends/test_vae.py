"""The band decode equals the single decode: image and video VAEs, even and uneven bands, tiles, several sizes."""

import logging
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from backends import hooks
from backends.distributed import Mesh
from backends.plan import ParallelPlan
from backends.vae import attach_band_decode, detach_band_decode, shares_decode
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
        for rows, columns in ((8 * world_size, 8), (8 * world_size + 1, 6)):
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
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 128
    latents = torch.randn(1, 4, 20, 20)
    want = decode(vae, latents)
    attach_band_decode(vae, mesh)
    torch.testing.assert_close(decode(vae, latents), want, rtol=0, atol=2e-5)
    assert mesh.traffic.messages > 0
    few_rows = torch.randn(1, 4, 15, 8)
    mesh.traffic.reset()
    decode(vae, few_rows)  # not worth sharing: whole on every rank
    assert mesh.traffic.messages == 0
    detach_band_decode(vae)
    assert not any(hooks.attached(module) for module in vae.modules())
    mesh.destroy()


def test_band_decode_shares_tiles_over_all_axes_and_leaves_the_vae_as_it_was(run_on_ranks):
    checkpoint("sdxl")
    run_on_ranks(check_tiles_and_axes, 2)


@torch.no_grad()
def check_other_class(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("patch", 2))
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("backends.vae").addHandler(handler)
    attach_band_decode(vae, mesh)
    assert any("a AutoencoderTiny cannot be cut into bands" in message for message in records)
    assert not shares_decode(vae)
    mesh.destroy()


def test_vae_of_another_class_is_decoded_whole_and_the_log_says_so(run_on_ranks):
    run_on_ranks(check_other_class, 2)


def test_one_rank_decodes_without_any_hook():
    vae = load("sdxl").vae
    attach_band_decode(vae, mesh_of(0, ("patch", 1)))
    assert hooks.attached(vae.decoder) == []
