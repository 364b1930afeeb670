"""The patch decode equals the single decode: image and video VAEs, even and uneven patches, tiles,
several sizes.
"""

import logging
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny

from backends import backend_class, planner
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.generation.previews import Previewer
from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.parallel import hooks
from backends.parallel.vae import attach_patch_decode, detach_patch_decode, splits_decode
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, GenerateResult, LoadRequest
from hosts.launch.command_line import parse_command_line
from hosts.launch.start_plan import plan_start
from tests.checkpoints import checkpoint, load, sample_image


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    frames = (
        {} if vae.config.get("norm_num_groups") else {"num_frames": latents.shape[0]}
    )  # the video VAE has no such field
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
            attach_patch_decode(vae, mesh)
            got = decode(vae, latents)
            detach_patch_decode(vae)
            assert mesh.traffic.messages > 0
            torch.testing.assert_close(
                got, want, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
            mesh.traffic.reset()
    mesh.destroy()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_band_decode_matches_the_single_decode(run_on_ranks, world_size):
    for name in ("sdxl", "sd3", "sdup", "svd"):
        checkpoint(name)
    run_on_ranks(check_decodes, world_size)


@torch.no_grad()
def check_preview(rank: int, world_size: int) -> None:
    pipe = load("sdxl")
    latents = torch.randn(1, 4, 16, 16)
    mesh = mesh_of(rank, ("patch", world_size))
    want = Previewer(pipe, spec=read_table()["sdxl"]).image(latents, height=128, width=128)
    attach_patch_decode(pipe.vae, mesh)
    if rank == 0:
        got = Previewer(pipe, spec=read_table()["sdxl"]).image(latents, height=128, width=128)
        assert (got == want).all() and mesh.traffic.messages == 0
    decode(pipe.vae, latents)
    assert mesh.traffic.messages > 0
    mesh.destroy()


def test_rank_whose_client_watches_makes_its_previews_by_itself(run_on_ranks):
    checkpoint("sdxl")
    run_on_ranks(check_preview, 2)


WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
FOUR = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8)}
LTX = FOUR | {"layers_per_block": (1, 1, 1, 1, 1), "patch_size": 2}
VIDEO = {
    "wan": ("AutoencoderKLWan", WAN),
    "wan 2.2": (
        "AutoencoderKLWan",
        WAN
        | {
            "is_residual": True,
            "decoder_base_dim": 8,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
    ),
    "qwen": ("AutoencoderKLQwenImage", WAN),
    "ltx": (
        "AutoencoderKLLTXVideo",
        LTX
        | {
            "decoder_block_out_channels": (8, 8, 8, 8),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
        },
    ),
    "ltx 2": (
        "AutoencoderKLLTX2Video",
        LTX
        | {
            "block_out_channels": (8, 16, 16, 32),
            "decoder_block_out_channels": (8, 16, 32),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "spatial_compression_ratio": 16,
        },
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        FOUR
        | {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        FOUR | {"layers_per_block": 1, "norm_num_groups": 4},
    ),
}
"""VAE of videos -> its class and a tiny configuration."""


def video_vae(name: str) -> Any:
    """Weights are large enough for the pixels of one rank to depend on those of the other."""
    kind, config = VIDEO[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**config).eval()
    for parameter in vae.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.2
    return vae


@torch.no_grad()
def check_videos(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("patch", world_size))
    for name in VIDEO:
        vae = video_vae(name)
        latents = torch.randn(1, 4, 1 if name == "qwen" else 3, 8 * world_size + 2, 6)
        pixels = vae.decode(latents).sample
        states = vae.encode(pixels).latent_dist.parameters
        for work, given, want in (("decode", latents, pixels), ("encode", pixels, states)):
            attach_patch_decode(vae, mesh)
            got = (
                vae.decode(given).sample
                if work == "decode"
                else vae.encode(given).latent_dist.parameters
            )
            detach_patch_decode(vae)
            assert mesh.traffic.messages > 0, f"{name}: {work} was not shared"
            mesh.traffic.reset()
            error = float((got - want).abs().max() / want.abs().max())
            assert error < 5e-6, f"{name}: {work} differs by {error:.1e} of the largest value"
        assert not any(hooks.attached(module) for module in vae.modules())
    mesh.destroy()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_videos_are_decoded_and_encoded_in_patches(run_on_ranks, world_size):
    run_on_ranks(check_videos, world_size)


@torch.no_grad()
def check_encodes(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("patch", world_size))
    for name in ("sdxl", "sd3", "flux2"):
        vae = load(name).vae
        height = 8 * (8 * world_size + 1)
        pixels = torch.randn(2, 3, height, 64)
        want = vae.encode(pixels).latent_dist.parameters
        attach_patch_decode(vae, mesh)
        got = vae.encode(pixels).latent_dist.parameters
        detach_patch_decode(vae)
        assert mesh.traffic.messages > 0, name
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        mesh.traffic.reset()
    mesh.destroy()


def test_images_are_encoded_in_patches(run_on_ranks):
    for name in ("sdxl", "sd3", "flux2"):
        checkpoint(name)
    run_on_ranks(check_encodes, 2)


@torch.no_grad()
def check_tiles_and_axes(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("cfg", 2), ("patch", 1))
    vae = load("sdxl").vae
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 128
    latents = torch.randn(1, 4, 20, 20)
    want = decode(vae, latents)
    attach_patch_decode(vae, mesh)
    torch.testing.assert_close(decode(vae, latents), want, rtol=0, atol=2e-5)
    assert mesh.traffic.messages > 0
    few_rows = torch.randn(1, 4, 15, 8)
    mesh.traffic.reset()
    decode(vae, few_rows)  # not worth sharing: whole on every rank
    assert mesh.traffic.messages == 0
    detach_patch_decode(vae)
    assert not any(hooks.attached(module) for module in vae.modules())
    mesh.destroy()


def test_band_decode_shares_tiles_over_all_axes_and_leaves_the_vae_as_it_was(run_on_ranks):
    checkpoint("sdxl")
    run_on_ranks(check_tiles_and_axes, 2)


CASES = {
    "sdxl": (("distrifuser", {}), ("asyncdiff", {})),
    "sdup": (("distrifuser", {"sync_mode": "full_sync", "no_split_batch": True}),),
    "sd3": (("xdit", {"ulysses_degree": 2}),),
    "svd": (("asyncdiff", {}),),
}


def drawn(
    pipeline: LoadedPipeline, name: str, backend_name: str, options: dict[str, Any], rank: int
) -> tuple[GenerateResult, bool]:
    """An image under this backend, every step synchronous; and whether the ranks shared the
    decode.
    """
    plan = planner(backend_name)(pipeline.spec, options, 2)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    pipeline.attach(backend_class(backend_name)(spec=pipeline.spec, plan=plan, mesh=mesh))
    is_shared = splits_decode(pipeline.pipe.vae)
    result = pipeline.generate(request_for(name))
    pipeline.detach()
    mesh.destroy()
    return result, is_shared


def request_for(name: str) -> GenerateRequest:
    fields = (
        {"image": sample_image(16 if name == "sdup" else 128)} if name in ("sdup", "svd") else {}
    )
    fields |= {"prompt": "a cat"} if name != "svd" else {"num_frames": 2}
    return GenerateRequest(
        seed=1, num_inference_steps=2, warmup_steps=2, height=128, width=64, **fields
    )


def check_backends(rank: int, world_size: int, name: str) -> None:
    load_request = LoadRequest(model_type=name, checkpoint=str(checkpoint(name)), variant="fp32")
    pipeline = load_pipeline(read_table()[name], load_request, device=torch.device("cpu"))
    want = pipeline.generate(request_for(name)).frames.astype(int)
    for backend_name, options in CASES[name]:
        pipeline.load = replace(pipeline.load, parallel_vae=True)
        shared, was_shared = drawn(pipeline, name, backend_name, options, rank)
        pipeline.load = replace(pipeline.load, parallel_vae=False)
        alone, was_shared_too = drawn(pipeline, name, backend_name, options, rank)
        assert was_shared and not was_shared_too and not splits_decode(pipeline.pipe.vae)
        assert shared.report["messages"] > alone.report["messages"], (
            f"{name}: the decode was not shared"
        )
        assert shared.exactness != "exact", (
            f"{name}: sums in another order are not the same arithmetic"
        )
        for result in (shared, alone):
            assert abs(result.frames.astype(int) - want).max() <= 1, (
                f"{name} on {backend_name}: more than rounding"
            )
        assert want.std() > 5, f"{name}: the image is flat, so this proves nothing"


@pytest.mark.parametrize(
    "name",
    ["sdxl", "sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdup", "svd"))],
)
def test_every_backend_shares_the_decode_unless_it_is_switched_off(run_on_ranks, name):
    checkpoint(name)
    run_on_ranks(check_backends, 2, name)


@pytest.mark.parametrize(
    ("argument", "is_wanted"),
    [
        (None, True),
        ("--parallel_vae=false", False),
        ("--use-parallel-vae=false", False),
        ("--parallel_vae", True),
    ],
)
def test_the_setting_and_its_older_name_decide(argument, is_wanted):
    settings = parse_command_line(["--type=sdxl", *([argument] if argument else [])])
    assert plan_start(settings, read_table(), num_gpus=0).load.parallel_vae is is_wanted


@torch.no_grad()
def check_other_class(rank: int, world_size: int) -> None:
    mesh = mesh_of(rank, ("patch", 2))
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("backends.parallel.vae").addHandler(handler)
    attach_patch_decode(vae, mesh)
    assert any("AutoencoderTiny cannot be cut into patches" in message for message in records)
    assert not splits_decode(vae)
    mesh.destroy()


def test_vae_of_another_class_is_decoded_whole_and_the_log_says_so(run_on_ranks):
    run_on_ranks(check_other_class, 2)


def test_one_rank_decodes_without_any_hook():
    vae = load("sdxl").vae
    attach_patch_decode(vae, mesh_of(0, ("patch", 1)))
    assert hooks.attached(vae.decoder) == []
