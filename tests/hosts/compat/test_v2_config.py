"""The v2 configuration of a pipeline -> our settings, for every key that changes
anything.
"""

import logging

import pytest

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.compat.v2_config import read_configuration
from hosts.launch.settings import Settings

BASE = Settings(port=6001, backend="asyncdiff", failure_timeout=30)


def read(**body):
    full = {"pipeline_type": "sdxl", "checkpoint": {"checkpoint": "/m"}, **body}
    return read_configuration(full, base=BASE, table=read_table())


def test_every_key_becomes_its_argument():
    settings = read(
        variant="bf16",
        backend_config={"model_n": 3, "stride": 2, "time_shift": 1, "synced_steps": 0,
            "synced_percent": 12.5, "shifted_steps": 1},
        lora={"/l/a.safetensors": 0.8},
        enable_vae_tiling=True,
        xformers_efficient=True,
        torch_config={"torch_cache_limit": 32, "torch_accumlated_cache_limit": 256,
            "torch_capture_scalar": True},
        compile_config={
            "compile_transformer": True, "compile_encoder": True, "compile_backend": "inductor",
            "compile_mode": "default",
            "compile_options": '{"triton.cudagraphs": true}', "compile_fullgraph_off": True,
        },
        transformer={"model": "/t.safetensors", "config": "/t.json"},
        vae={"checkpoint": "/vae"},
        control_net={"checkpoint": "/c"},
        ip_adapter={"model": "/i.bin"},
        group_offload_config={"transformer": {"offload_type": "leaf_level"}},
        quantization_config={
            "transformer": {
                "backend": "bitsandbytes", "load_in_4bit": True,
                "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "fp4",
            },
            "encoder": {"backend": "quanto", "quant_type": "int8"},
            "vae": {"backend": "torchao", "quant_type": "int8wo"},
            "tokenizer": {"backend": "quanto", "quant_type": "int8"},
        },
    )  # fmt: skip
    assert settings.given == {
        "type": "sdxl", "port": 6001, "checkpoint": "/m", "backend": "asyncdiff",
        "failure_timeout": 30, "variant": "bf16", "vae": "/vae",
        "unet": "/t.safetensors", "unet_config": "/t.json", "lora": {"/l/a.safetensors": 0.8},
        "control_net": {"/c": 1.0},
        "ip_adapter": {"/i.bin": 1.0}, "quantize_unet_to": "bnb,int4,bf16,int8,fp4",
        "quantize_encoder_to": "int8", "quantize_vae": "tao,int8wo",
        "compile_unet": True, "compile_text_encoder": True, "compile_backend": "inductor",
        "compile_options": {"triton.cudagraphs": True},
        "compile_fullgraph_off": True, "torch_cache_limit": 32,
        "torch_accumulated_cache_limit": 256, "torch_capture_scalar": True,
        "enable_vae_tiling": True, "xformers_efficient": True, "enable_group_offload": True,
        "model_n": 3, "stride": 2, "time_shift": True, "warmup_steps": 0, "synced_percent": 12.5,
    }  # fmt: skip


def test_transformers_and_dtypes_go_by_the_type_and_the_newer_names():
    settings = read(
        pipeline_type="flux",
        transformer={"checkpoint": "/t"},
        infer_dtype="float16",
        compile_config={"fullgraph": False},
    )
    assert (
        settings.transformer,
        settings.unet,
        settings.variant,
        settings.compile_fullgraph_off,
    ) == ("/t", None, "fp16", True)


def test_what_has_no_effect_is_logged_and_what_is_off_is_not(caplog):
    with caplog.at_level(logging.WARNING):
        settings = read(
            vae_fp16=True,
            attn_backend_config={"backend": "flash"},
            lora={},
            compile_config={},
            sd_fuse_qkv_projections=False,
        )
    assert settings.given == {
        "type": "sdxl",
        "port": 6001,
        "checkpoint": "/m",
        "backend": "asyncdiff",
        "failure_timeout": 30,
    }
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "attn_backend_config",
        "vae_fp16",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"pipeline_type": None}, "pipeline_type is missing"),
        ({"checkpoint": "/m"}, "checkpoint must be an object, not str"),
        ({"transformer": {"model": 5}}, "transformer must be"),
        (
            {"quantization_config": {"vae": "int8"}},
            "quantization_config.vae must be an object, not str",
        ),
        ({"variant": "fp8"}, "--variant=fp8 is not allowed"),
        ({"backend_config": {"stride": 9}}, "--stride=9 is not allowed"),
    ],
)
def test_what_cannot_be_meant_is_refused(body, message):
    with pytest.raises(ConfigError, match=message):
        read(**body)
