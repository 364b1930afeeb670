"""Tensor parallelism: equal to one device, 1/N of the planned weights, whole again afterwards; and
what it refuses.
"""

from typing import get_args

import diffusers
import pytest
import torch

from backends.errors import PlanError, UnsupportedError
from backends.model_table import read_table
from backends.parallel.transformers import TRANSFORMERS
from backends.parallel.weight_shards import weight_bytes
from backends.xdit.tensor import TensorParallel
from tests.backends.reference import from_rank_zero
from tests.backends.xdit.ranks import assert_close, attached, generated, latents_of
from tests.checkpoints import (
    IP_ADAPTER_FILE,
    IP_ADAPTER_IMAGE_ENCODER,
    checkpoint,
    ip_adapter,
    load,
    lora,
)


def check_matches_single(rank, world_size, name, sets):
    pipe = load(name)
    want = from_rank_zero(lambda: [latents_of(pipe, name, size=size, steps=2) for size in (64, 80)])
    whole, state = (
        weight_bytes(pipe.transformer),
        {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()},
    )
    for options in sets:
        degree = options["tensor_parallel_degree"]
        with attached(pipe, name, rank, world_size, **options) as backend:
            for size, latents in zip((64, 80), want, strict=True):
                assert_close(
                    generated(backend, pipe, name, size=size, steps=2), latents, (options, size)
                )
            assert not backend.has_whole_weights
            shard = weight_bytes(pipe.transformer) / whole
            assert shard < {2: 0.75, 4: 0.65}[degree], (
                f"rank {rank} keeps {shard:.0%} of the weights"
            )
        assert all(
            torch.equal(tensor, state[name])
            for name, tensor in pipe.transformer.state_dict().items()
        ), "detached"


@pytest.mark.parametrize(
    "name",
    ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux2", "qwenimage"))],
)
def test_two_tensor_ranks_match_single(run_on_ranks, name):
    checkpoint(name)
    run_on_ranks(check_matches_single, 2, name, [{"tensor_parallel_degree": 2}])


@pytest.mark.slow
def test_four_tensor_ranks_match_single_also_with_ulysses_and_ring(run_on_ranks):
    checkpoint("flux")
    sets = [
        {"tensor_parallel_degree": 4},
        *({"tensor_parallel_degree": 2, name: 2} for name in ("ulysses_degree", "ring_degree")),
    ]
    run_on_ranks(check_matches_single, 4, "flux", sets)


def test_planner_knows_which_classes_diffusers_has_a_tensor_plan_for():
    for spec in read_table().values():
        if spec.denoiser == "transformer" and spec.supports("xdit").status != "unsupported":
            name = type_of_transformer(spec)
            has_plan = getattr(diffusers, name)._tp_plan is not None
            assert has_plan == TRANSFORMERS[name].has_tensor_plan, name


def type_of_transformer(spec):
    annotated = getattr(diffusers, spec.pipeline).__init__.__annotations__["transformer"]
    return (get_args(annotated) or (annotated,))[0].__name__  # Wan's may be None


def check_refusals(rank, world_size):
    with pytest.raises(
        UnsupportedError,
        match=(
            r"not available for SD3Transformer2DModel: diffusers has no tensor plan for it. Use "
            r"--ulysses"
        ),
    ):
        attach(load("sd3"), rank, world_size)
    pipe = load("flux")
    with pytest.raises(
        PlanError, match=r"tensor_parallel_degree=3 does not fit this model: Cannot shard"
    ):
        TensorParallel(pipe.transformer, None)._specs(3)
    pipe.load_lora_weights(str(lora("flux")))
    with pytest.raises(
        UnsupportedError,
        match=(
            r"cuts plain linear layers, but .* is of a Linear: quantised layers and LoRAs "
            r"cannot "
            r"be cut"
        ),
    ):
        attach(pipe, rank, world_size)
    pipe = load("flux")
    encoder = ip_adapter("flux") / IP_ADAPTER_IMAGE_ENCODER
    pipe.load_ip_adapter(
        str(ip_adapter("flux")),
        subfolder="",
        weight_name=str(IP_ADAPTER_FILE),
        image_encoder_pretrained_model_name_or_path=str(encoder),
    )
    with pytest.raises(
        UnsupportedError,
        match=r"cannot cut the IP-Adapter in transformer_blocks.0.attn. Use --ulysses_degree",
    ):
        attach(pipe, rank, world_size)


def attach(pipe, rank, world_size):
    with attached(pipe, "flux", rank, world_size, tensor_parallel_degree=2):
        pass


def test_rejects_models_without_a_plan_and_layers_that_cannot_be_cut(run_on_ranks):
    for name in ("sd3", "flux"):
        checkpoint(name)
    lora("flux"), ip_adapter("flux")
    run_on_ranks(check_refusals, 2)
