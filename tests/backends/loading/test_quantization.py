"""Quantised weights: what is packed, what it saves, how far it is off, and what can be laid on top
of it.
"""

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from backends import planner
from backends.errors import ConfigError, UnsupportedError
from backends.loading import packed_weights, quantization
from backends.loading.packed_weights import pack_layer
from backends.loading.quantization import weight_bytes
from backends.quantization_spec import EVERYWHERE, QuantizationSpec, parse_quantization
from tests.backends.features import TABLE, loaded
from tests.backends.loading.test_adapters import difference, draw
from tests.checkpoints import controlnet, lora, sample_image

LARGEST_ERROR = {"float8": 0.07, "int8": 0.006, "int4": 0.08, "int2": 0.4}
"""Of a weight, as a share of the row's (or group's) range: half a step, for float8 half a step at 3
bits of mantissa.
"""
BYTES = {"float8": 1.0, "int8": 1.0, "int4": 0.5, "int2": 0.25}
"""Per weight, without scales."""


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize(
    "layer", [nn.Linear(100, 24), nn.Conv2d(8, 24, 3)], ids=["linear", "convolution"]
)
def test_a_packed_weight_is_close_small_and_still_a_layer_of_its_class(kind, layer):
    layer = type(layer)(*((100, 24) if isinstance(layer, nn.Linear) else (8, 24, 3)))
    weight = layer.weight.detach().clone()
    pack_layer(layer, kind)
    assert is_parametrized(layer, "weight") and isinstance(layer, nn.Linear | nn.Conv2d)
    assert layer.weight.shape == weight.shape and layer.weight.dtype == weight.dtype
    reach = weight.flatten(1).abs().amax(1).max()
    assert 0 < float((layer.weight - weight).abs().max()) <= LARGEST_ERROR[kind] * 2 * float(reach)
    values = layer.parametrizations["weight"].original0
    padded = (
        -(-weight[0].numel() // packed_weights.GROUP) * packed_weights.GROUP * 24
        if kind in ("int4", "int2")
        else weight.numel()
    )
    assert values.numel() * values.element_size() == padded * BYTES[kind]


def test_packed_weights_survive_a_change_of_dtype():
    """SDXL's VAE is decoded in float32 and put back afterwards."""
    layer = nn.Linear(64, 8).half()
    pack_layer(layer, "float8")
    before = layer.weight
    layer.float()
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.half().weight, before)


def quantized(name, **groups):
    return {
        "quantize": {
            group: parse_quantization(text, option="quantize_to") for group, text in groups.items()
        }
    }


@pytest.mark.parametrize("kind", [*EVERYWHERE, "bnb,int8", "bnb,int4,fp32,int8,nf4"])
def test_each_kind_changes_the_image_and_reports_what_it_saved(kind, caplog):
    plain = loaded(TABLE["pixa"])
    with caplog.at_level(logging.INFO):
        pipe = loaded(TABLE["pixa"], **quantized("pixa", denoiser=kind, encoders=kind))
    assert difference(draw(pipe), draw(plain)) > 0
    saved = pipe._bytes_saved
    assert set(saved) == {"transformer", "text_encoder"}
    for component, count in saved.items():
        assert (
            count
            == weight_bytes(getattr(plain.pipe, component))
            - weight_bytes(getattr(pipe.pipe, component))
            > 0
        )
    assert pipe._report(0, 1)["bytes_saved"] == saved
    assert "quantised transformer to " in caplog.text


def draw_request(pipe):
    from tests.backends.features import request_for

    return request_for(pipe.spec)


def test_groups_name_the_components_they_quantise():
    pipe = loaded(
        TABLE["sd1"],
        control_net={str(controlnet("sd1")): 1.0},
        **quantized("sd1", misc="int8", vae="int8"),
    )
    assert set(pipe._bytes_saved) == {"controlnet", "vae"}
    draw(pipe, control_image=sample_image(40))
    video = loaded(TABLE["ad"], **quantized("ad", misc="int8"))
    assert set(video._bytes_saved) == {"motion_modules"}
    packed = [
        name for name, layer in video.pipe.unet.named_modules() if is_parametrized(layer, "weight")
    ]
    assert packed and all("motion_modules" in name for name in packed)


@pytest.mark.parametrize("kind", ["int8", "int4", "bnb,int8"])
def test_a_lora_acts_on_quantised_weights_and_a_request_can_take_it_off(kind):
    path = str(lora("pixa"))
    base = draw(loaded(TABLE["pixa"], **quantized("pixa", denoiser=kind)))
    pipe = loaded(TABLE["pixa"], lora={path: 1.0}, **quantized("pixa", denoiser=kind))
    assert difference(draw(pipe), base) > 5
    assert difference(draw(pipe, lora={}), base) == 0


def test_a_kernel_that_does_not_run_here_is_an_error_that_names_what_does(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("bitsandbytes.nn.Linear8bitLt.forward", broken)
    with pytest.raises(
        ConfigError,
        match=(
            r"bnb_int8 does not run on this machine's cpu .*no kernel.* These run everywhere: "
            r"float8, int8"
        ),
    ):
        loaded(TABLE["pixa"], **quantized("pixa", denoiser="bnb,int8"))


def test_a_missing_library_is_an_error_that_names_what_runs_without(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError,
        match=r"needs the package bitsandbytes, which is not installed. These run everywhere",
    ):
        loaded(TABLE["pixa"], **quantized("pixa", denoiser="bnb,int8"))


def test_split_weights_and_packed_weights_do_not_go_together():
    from types import SimpleNamespace

    pipe = loaded(TABLE["pixa"], **quantized("pixa", denoiser="int8"))
    plan = planner("distrifuser")(
        TABLE["pixa"], {"parallelism": "tensor", "no_split_batch": True}, 2
    )
    backend = SimpleNamespace(has_whole_weights=False, plan=plan)
    with pytest.raises(
        UnsupportedError,
        match=(
            r"quantised weights are not available with distrifuser: .* and sharded weights: "
            r".*\. Leave out --parallelism=tensor, or the quantisation"
        ),
    ):
        pipe.attach(backend)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("int8", QuantizationSpec(kind="int8")),
        ("tao,int4wo", QuantizationSpec(kind="int4")),
        ("tao,float8wo", QuantizationSpec(kind="float8")),
        ("tao,uint2wo", QuantizationSpec(kind="int2")),
        ("bnb,int8", QuantizationSpec(kind="bnb_int8")),
        ("bnb,int4,bf16,int8,fp4", QuantizationSpec(kind="bnb_int4", compute="bf16", qtype="fp4")),
    ],
)
def test_the_clients_names_are_understood(text, want):
    assert parse_quantization(text, option="quantize_to") == want


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("int3", "float8, int8, int4, int2, bnb,int8 or bnb,int4"),
        ("bnb,int4", "float8, int8"),
        ("bnb,int4,bf16,int8,nf5", "float8, int8"),
        ("tao,uint3wo", "tao,int8wo, tao,int4wo, tao,float8wo, tao,uint4wo, tao,uint2wo"),
        ("tao,fp6_e3m2", "tao,int8wo"),
    ],
)
def test_refuses_kinds_that_do_not_exist_and_names_those_that_do(text, allowed):
    with pytest.raises(ConfigError) as caught:
        parse_quantization(text, option="quantize_unet_to")
    assert f"--quantize_unet_to={text} is not allowed. Allowed: {allowed}" in str(caught.value)


def test_attention_pools_keep_their_weights_under_bitsandbytes():
    pipe = loaded(TABLE["hy"], **quantized("hy", denoiser="bnb,int8"))
    assert type(pipe.pipe.transformer.time_extra_emb.pooler.q_proj) is nn.Linear
    assert quantization.POOLING == "time_extra_emb.pooler"
    draw(pipe)
