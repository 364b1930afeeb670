"""Real denoisers that do what those of the model table do not: several outputs, a list of outputs,
outputs of another class, results changed in place, weights read outside their block, a timestep by
another name.
"""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from backends.asyncdiff.backend import AsyncDiffBackend
from backends.asyncdiff.plan import make_plan
from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.parallel.base import RunInfo
from backends.parallel.hooks import output_parts
from backends.request import GenerateRequest
from tests.backends.asyncdiff.runs import parameter_counts
from tests.checkpoints.denoisers import unet

STEPS = 4
Case = tuple[torch.nn.Module, dict[str, Any]]


def two_outputs() -> Case:
    """LTX-2 makes video and sound in one call."""
    denoiser = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=3,
        caption_channels=16,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 2 * 2 * 2, 4),
        "audio_hidden_states": torch.randn(2, 4, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "audio_encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.full((2, 8), 500.0),
        "audio_timestep": torch.full((2, 4), 500.0),
        "sigma": torch.full((2,), 500.0),
        "audio_sigma": torch.full((2,), 500.0),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "audio_num_frames": 4,
    }


def a_list_of_outputs() -> Case:
    """Cosmos 3 returns one tensor for each video."""
    denoiser = diffusers.Cosmos3OmniTransformer(
        head_dim=8,
        hidden_size=16,
        intermediate_size=32,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=4,
        num_key_value_heads=2,
        rope_axes_dim=(2, 1, 1),
        vocab_size=20,
    )
    return denoiser, {
        "input_ids": torch.tensor([1, 2, 3]),
        "text_indexes": torch.arange(3),
        "position_ids": torch.arange(11).expand(3, -1),
        "und_len": 3,
        "sequence_length": 11,
        "vision_tokens": [torch.randn(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": torch.arange(3, 11),
        "vision_mse_loss_indexes": torch.arange(3, 11),
        "vision_timesteps": torch.full((8,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def changed_in_place() -> Case:
    """A UNet adds a T2I adapter's residuals to what its blocks return."""
    return unet(), {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "down_intrablock_additional_residuals": [
            torch.randn(2, channels, side, side)
            for channels, side in ((8, 16), (16, 8), (16, 4), (16, 2))
        ],
    }


def shared_weights() -> Case:
    """DiT's output uses the first block's embedding."""
    denoiser = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }


def other_output_class() -> Case:
    denoiser = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        embedding_dim=16,
        num_embeddings=5,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 16),
        "timestep": torch.tensor(5.0),
        "proj_embedding": torch.randn(2, 16),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }


def other_timestep() -> Case:
    denoiser = diffusers.StableCascadeUNet(
        block_out_channels=(16, 16),
        conditioning_dim=16,
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=16,
        clip_text_pooled_in_channels=16,
        clip_image_in_channels=16,
        switch_level=(False,),
        timestep_ratio_embedding_dim=16,
    )
    return denoiser, {
        "sample": torch.randn(2, 16, 8, 8),
        "timestep_ratio": torch.full((2,), 0.5),
        "clip_text_pooled": torch.randn(2, 1, 16),
        "clip_text": torch.randn(2, 5, 16),
        "clip_img": torch.randn(2, 1, 16),
    }


def whole_numbers() -> Case:
    """Lumina's embedding of patches returns a mask and the number of tokens beside the tokens."""
    denoiser = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "encoder_mask": torch.ones(2, 5),
        "image_rotary_emb": torch.randn(8, 8, 4, dtype=torch.complex64),
        "cross_attention_kwargs": {},
    }


CASES = (
    two_outputs,
    a_list_of_outputs,
    changed_in_place,
    shared_weights,
    other_output_class,
    other_timestep,
    whole_numbers,
)


def fresh(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies, since some denoisers take residuals off their list."""
    return {
        name: list(value) if isinstance(value, list) else value for name, value in arguments.items()
    }


def check(rank: int, world_size: int) -> None:
    for case in CASES:
        for is_sharded in (False, True):
            torch.manual_seed(0)
            denoiser, arguments = case()
            denoiser.eval().requires_grad_(False)
            want = output_parts(denoiser(**fresh(arguments)))
            with_options(denoiser, rank, world_size, {"shard_weights": is_sharded}, arguments, want)


def with_options(
    denoiser: torch.nn.Module,
    rank: int,
    world_size: int,
    options: dict[str, object],
    arguments: dict[str, Any],
    want: list[torch.Tensor],
) -> None:
    plan = make_plan(read_table()["sd1"], options, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = AsyncDiffBackend(spec=read_table()["sd1"], plan=plan, mesh=mesh)
    backend.costs_of = parameter_counts
    backend.attach_denoiser(None, denoiser)
    request = GenerateRequest(prompt="a", seed=0, warmup_steps=2)
    backend.begin(RunInfo(request=request, height=8, width=8, num_inference_steps=STEPS))
    for _ in range(STEPS):
        # the input is the same in each step, so stale values are the right ones too
        got = output_parts(denoiser(**fresh(arguments)))
        for one, two in zip(want, got, strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
        backend.step_done()
    assert backend.report()["stale_evaluations"] == 2
    backend.end()
    backend.detach_denoiser(None, denoiser)
    mesh.destroy()


def far(num_frames: int, *, fills: bool) -> dict[str, Any]:
    """The arguments of one call of AnyFlow FAR, without its cache."""
    return {
        "hidden_states": torch.randn(2, num_frames, 4, 4, 4),
        "timestep": torch.full((2, num_frames), 500.0),
        "r_timestep": torch.full((2, num_frames), 250.0),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "chunk_partition": [1],
        "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": fills},
        "return_dict": False,
    }


def check_cache(rank: int, world_size: int) -> None:
    """A call that fills a cache ends before the output's units, and the next one reads it."""
    torch.manual_seed(0)
    plan = make_plan(read_table()["sd1"], {"shard_weights": True}, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = AsyncDiffBackend(spec=read_table()["sd1"], plan=plan, mesh=mesh)
    denoiser = diffusers.AnyFlowFARTransformer3DModel(
        patch_size=(1, 2, 2),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
        gate_value=0.25,
        deltatime_type="r",
        chunk_partition=(1, 1),
    )
    denoiser.eval().requires_grad_(False)
    first, fill, second = far(1, fills=False), far(1, fills=True), far(1, fills=False)
    mask = denoiser.build_attention_mask(
        chunk_partition=[1], height=4, width=4, device=mesh.device, mode="cache"
    )
    fill |= {"attention_mask": mask}
    second |= {"chunk_partition": [1, 1], "kv_cache_flag": {"num_cached_chunks": 1}}
    second["kv_cache_flag"]["is_cache_step"] = False

    def run(step_done: Callable[[], None]) -> list[torch.Tensor | None]:
        shape = (2, 2, 2, 12, 12)
        cache = {
            layer: {"full_cache": torch.zeros(shape), "compressed_cache": torch.zeros(shape)}
            for layer in range(4)
        }
        found = []
        for arguments in (first, first, first, fill, second):
            found.append(denoiser(**copy.deepcopy(arguments), kv_cache=cache)[0])
            step_done()
        return found

    want = run(lambda: None)
    backend.attach_denoiser(None, denoiser)
    request = GenerateRequest(prompt="a", seed=0, warmup_steps=1)
    backend.begin(RunInfo(request=request, height=8, width=8, num_inference_steps=STEPS))
    got = run(backend.step_done)
    assert want[3] is None and got[3] is None
    for number in (0, 1, 2, 4):
        torch.testing.assert_close(got[number], want[number], rtol=0, atol=1e-6)
    assert backend.report()["stale_evaluations"] == 0
    backend.end()
    backend.detach_denoiser(None, denoiser)
    mesh.destroy()


def test_a_call_that_fills_a_cache_ends_early(run_on_ranks: Callable[..., None]) -> None:
    run_on_ranks(check_cache, 2)


def test_unusual_denoisers_give_the_same_in_segments(run_on_ranks: Callable[..., None]) -> None:
    run_on_ranks(check, 2)


@pytest.mark.parametrize("case", CASES)
def test_the_cases_are_what_they_say(case: Callable[[], Case]) -> None:
    denoiser, arguments = case()
    output = denoiser(**fresh(arguments))
    assert len(output_parts(output)) == (2 if case is two_outputs else 1)
    assert hasattr(output, "sample") == (case is not other_output_class)
    assert isinstance(output_parts(output)[0], list) == (case is a_list_of_outputs)
