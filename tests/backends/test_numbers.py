"""Which numbers weights are loaded and computed in."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from backends.generation.pipeline import load_pipeline
from backends.generation.previews import Previewer
from backends.loading.offload import overflows, without_overflow
from backends.model_table import FEATURES
from backends.request import LoadRequest
from tests.backends.features import CPU, TABLE, combined, loaded, request_for, result
from tests.checkpoints import checkpoint


def load(name, folder, variant):
    return load_pipeline(
        TABLE[name],
        LoadRequest(model_type=name, checkpoint=str(folder), variant=variant),
        device=CPU,
    ).pipe


def test_vae_of_wan_is_fp32():
    pipe = load("wan_t2v", checkpoint("wan_t2v"), "bf16")
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_files_of_the_wanted_numbers_are_taken_even_beside_others(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("sdxl"), folder)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    marked = {
        name: torch.full_like(tensor, 0.5, dtype=torch.float16)
        for name, tensor in load_file(plain).items()
    }
    save_file(
        marked,
        plain.with_name("diffusion_pytorch_model.fp16.safetensors"),
        metadata={"format": "pt"},
    )
    half, whole = (
        load("sdxl", folder, variant).unet.conv_in.weight for variant in ("fp16", "fp32")
    )
    assert half.unique().tolist() == [0.5]
    assert len(whole.unique()) > 1
    plain.unlink()
    assert load("sdxl", folder, "fp32").unet.conv_in.weight.unique().tolist() == [
        0.5
    ]  # the only ones


@pytest.mark.parametrize(
    ("said", "variant", "is_upcast"),
    [(True, "fp16", True), (None, "fp16", False), (False, "fp16", False), (True, "bf16", False)],
)
def test_vae_is_upcast_where_its_checkpoint_says_so(tmp_path, said, variant, is_upcast):
    folder = tmp_path / "vae"
    shutil.copytree(checkpoint("sd1") / "vae", folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("force_upcast", None)
    (folder / "config.json").write_text(
        json.dumps(config if said is None else {**config, "force_upcast": said})
    )
    vae = AutoencoderKL.from_pretrained(
        folder, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    )
    assert overflows(vae) == is_upcast
    with without_overflow(vae):
        assert (vae.dtype == torch.float32) == is_upcast
    assert vae.dtype != torch.float32


def test_vae_that_overflows_in_fp16_has_previews_all_the_same():
    pipe = load("sdxl", checkpoint("sdxl"), "fp16")
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(3e4)  # sums of 27 of them are too large for fp16
    latents = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8, dtype=torch.float16)
    assert Previewer(pipe, spec=TABLE["sdxl"]).image(latents, height=64, width=64) is not None
    assert pipe.vae.dtype == torch.float16


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", TABLE)
def test_every_feature_in_half_precision_is_near_the_same_in_float32(name):
    spec = TABLE[name]
    for what in [*FEATURES, "prediction"]:
        if (
            spec.supports("single", "step_cache" if what == "prediction" else what).status
            == "unsupported"
        ):
            continue
        case = combined([what], spec)
        asked = request_for(spec, num_inference_steps=case.steps, **case.request)
        pipe = loaded(spec, **case.load)
        want, other = (result(pipe, asked.model_copy(update={"seed": seed})) for seed in (1, 2))
        got = result(loaded(spec, **case.load, variant="bf16"), asked)
        assert torch.isfinite(got).all(), what
        ratio = float((got - want).abs().mean() / (other - want).abs().mean())
        # weights that were rounded before may fall on another of the 16 values of int4
        assert ratio < (0.5 if what == "quantization" else 0.3), (what, ratio)
