"""Which files of published repositories are needed, by their names alone."""

import pytest

from backends.errors import ConfigError
from backends.hub.choice import chosen_weights, is_complete, scope_of, small_files, weight_files
from backends.hub.names import HubName, parse_name

MODELS = ["text_encoder/model", "text_encoder_2/model"]
NETS = ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]
SDXL = [
    ".gitattributes",
    "01.png",
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    *(f"{name}.{kind}safetensors" for name in (*MODELS, *NETS) for kind in ("", "fp16.")),
    *(f"{name.split('/')[0]}/config.json" for name in (*MODELS, *NETS)),
    *(f"{name.split('/')[0]}/openvino_model.{kind}" for name in MODELS for kind in ("bin", "xml")),
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder_2/model.onnx",
    "text_encoder_2/model.onnx_data",
    *(f"tokenizer{n}/{file}" for n in ("", "_2") for file in ("merges.txt", "vocab.json")),
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "unet/model.onnx_data",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json",
    "vae_decoder/model.onnx",
]
SDXL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    **{name: ["transformers", "X"] for name in ("text_encoder", "text_encoder_2")},
    **{name: ["transformers", "X"] for name in ("tokenizer", "tokenizer_2")},
    **{name: ["diffusers", "X"] for name in ("scheduler", "unet", "vae")},
}
SD1 = [
    "model_index.json",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.bin",
]
SD1_INDEX = {
    **{name: ["diffusers", "X"] for name in ("scheduler", "unet", "vae")},
    **{name: ["transformers", "X"] for name in ("text_encoder", "tokenizer", "feature_extractor")},
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
SHARDS = [f"transformer/diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
FLUX = [
    "ae.safetensors",
    "flux1-dev.safetensors",
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *SHARDS,
]
FLUX_INDEX = {"transformer": ["diffusers", "FluxTransformer2DModel"]}


def pipeline(names, index, **options):
    return scope_of(names, index, kind="pipeline", option="checkpoint", path="", **options)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("acme/tiny", HubName(repo="acme/tiny")),
        ("acme/tiny.v1-5@fp16", HubName(repo="acme/tiny.v1-5", revision="fp16")),
        ("acme/tiny@refs/pr/7", HubName(repo="acme/tiny", revision="refs/pr/7")),
        ("acme/tiny/a/b.gguf", HubName(repo="acme/tiny", path="a/b.gguf")),
        (
            "acme/tiny@abc/b.safetensors",
            HubName(repo="acme/tiny", revision="abc", path="b.safetensors"),
        ),
    ],
)
def test_a_name_is_read(text, name):
    assert parse_name(text) == name and str(name) == text


@pytest.mark.parametrize(
    "text", ["/a/b", "./a/b", "~/a/b", "../a", "a", "a/../b/c", "models/mine.safetensors", "a b/c"]
)
def test_what_can_only_be_a_path_is_no_name(text):
    assert parse_name(text) is None


@pytest.mark.parametrize(("variant", "kind"), [("fp16", ".fp16"), ("fp32", ""), ("bf16", "")])
def test_one_variant_in_safetensors_is_chosen(variant, kind):
    scope = pipeline(SDXL, SDXL_INDEX)
    chosen = chosen_weights(scope, SDXL, variant=variant, denoiser="unet")
    assert sorted(chosen) == sorted(f"{name}{kind}.safetensors" for name in (*MODELS, *NETS))
    assert set(small_files(scope, SDXL)) == {
        name
        for name in SDXL
        if name.endswith((".json", ".txt")) and not name.startswith(("vae_1_0", "vae_decoder"))
    }


def test_pickles_are_taken_only_where_there_is_nothing_else_and_no_safety_checker():
    scope = pipeline(SD1, SD1_INDEX)
    assert sorted(chosen_weights(scope, SD1, variant="fp16", denoiser="unet")) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ]
    assert not [name for name in weight_files(scope, SD1) if "safety" in name or "v1-5" in name]


def test_replaced_components_need_no_weights():
    scope = pipeline(SDXL, SDXL_INDEX, without={"vae", "unet"})
    chosen = chosen_weights(scope, SDXL, variant="fp16", denoiser="unet")
    assert sorted(chosen) == [f"{name}.fp16.safetensors" for name in MODELS]
    assert "vae/config.json" in small_files(scope, SDXL)


def test_all_shards_are_needed():
    scope = pipeline(FLUX, FLUX_INDEX)
    assert chosen_weights(scope, FLUX, variant="bf16", denoiser="transformer") == SHARDS
    assert is_complete(scope, FLUX)
    assert not is_complete(scope, [name for name in FLUX if name != SHARDS[1]])


def test_a_local_copy_with_one_variant_is_complete():
    scope = pipeline(SDXL, SDXL_INDEX)
    half = [name for name in SDXL if "fp16" in name or name.endswith((".json", ".txt"))]
    assert is_complete(scope, half)
    assert not is_complete(scope, [name for name in half if not name.startswith("vae/d")])
    assert not is_complete(scope, [name for name in half if not name.startswith("tokenizer_2/")])


def test_one_component_of_a_whole_checkpoint_is_found():
    scope = scope_of(SDXL, {}, kind="component", option="vae", path="")
    assert (scope.path, list(scope.folders)) == ("", ["vae"])
    scope = scope_of(SDXL, {}, kind="component", option="vae", path="vae_1_0")
    assert chosen_weights(scope, SDXL, variant="fp16", denoiser="unet") == [
        "vae_1_0/diffusion_pytorch_model.safetensors"
    ]


def test_the_only_file_of_a_repository_needs_no_name():
    names = ["README.md", "pytorch_lora_weights.safetensors", "other.safetensors"]
    scope = scope_of(names, {}, kind="file", option="lora", path="")
    assert scope.path == "pytorch_lora_weights.safetensors"
    with pytest.raises(ConfigError, match=r"holds 2 files of weights\. Add one of them: a.gguf, b"):
        scope_of(["a.gguf", "b.gguf"], {}, kind="file", option="gguf_model", path="")


def test_an_ip_adapter_brings_its_image_encoder():
    names = [
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
        "sdxl_models/image_encoder/config.json",
        "sdxl_models/image_encoder/model.safetensors",
        "sdxl_models/ip-adapter_sdxl.bin",
        "sdxl_models/ip-adapter_sdxl.safetensors",
    ]
    path = "sdxl_models/ip-adapter_sdxl.safetensors"
    scope = scope_of(names, {}, kind="file", option="ip_adapter", path=path)
    assert chosen_weights(scope, names, variant="fp16", denoiser="unet") == [
        path,
        "sdxl_models/image_encoder/model.safetensors",
    ]
