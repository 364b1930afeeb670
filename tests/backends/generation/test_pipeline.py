"""Loading and one generation, against plain calls of diffusers' own pipelines."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from backends.errors import ConfigError, RequestError, UnsupportedError
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.generation.step_driver import EndRun
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from tests.altered import changed
from tests.checkpoints import NAMES, checkpoint, load
from tests.checkpoints.single_file import single_file

TABLE = read_table()
CPU = torch.device("cpu")
SIDE = 64
_LOADED: dict[str, LoadedPipeline] = {}


def loaded(name: str) -> LoadedPipeline:
    """One pipeline per type for the whole file: loading costs more than drawing."""
    if name not in _LOADED:
        request = LoadRequest(
            model_type=name,
            checkpoint=str(checkpoint(name)),
            variant="fp32",
            height=SIDE,
            width=SIDE,
        )
        _LOADED[name] = load_pipeline(TABLE[name], request, device=CPU)
    return _LOADED[name]


def sample_image(seed: int = 0, side: int = SIDE) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    )


def request_for(name: str, **more: object) -> GenerateRequest:
    spec = TABLE[name]
    fields: dict[str, object] = {"seed": 3, "num_inference_steps": 3}
    if "prompt" in spec.requires:
        fields |= {"prompt": "a photo of a cat", "negative_prompt": "a dog"}
    if "image" in spec.requires:
        fields["image"] = sample_image(side=SIDE // spec.upscale)
    if spec.output == "video":
        fields["num_frames"] = 3
    return GenerateRequest(**(fields | more))


def plain_call(name: str, **more: object) -> np.ndarray:
    """What diffusers draws for request_for(name), called by hand: uint8 (N, H, W, 3). more:
    further arguments.
    """
    spec, pipe = TABLE[name], load(name)
    arguments: dict[str, object] = {
        "generator": torch.Generator().manual_seed(3),
        "num_inference_steps": 3,
        "output_type": "np",
        **spec.call,
    }
    if spec.guidance != "frame_ramp":
        arguments[spec.guidance_argument] = spec.guidance_scale
    if "prompt" in spec.requires:
        arguments["prompt"] = "a photo of a cat"
    elif name == "sdup":
        arguments["prompt"] = ""
    if "prompt" in spec.requires and spec.guidance == "cfg":
        arguments["negative_prompt"] = "a dog"
    if "image" in spec.requires:
        arguments["image"] = sample_image(side=SIDE // spec.upscale)
    if spec.upscale == 1:
        arguments |= {"height": SIDE, "width": SIDE}
    if "max_area" in inspect.signature(pipe.__call__).parameters:
        arguments["max_area"] = SIDE * SIDE
    if spec.output == "video":
        arguments["num_frames"] = 3
    if name == "svd":
        arguments["decode_chunk_size"] = 8
    output = pipe(**(arguments | more))
    pixels = output.frames[0] if spec.output == "video" else output.images
    return (pixels * 255).round().astype(np.uint8)


def test_speed_of_a_video_is_that_of_the_request_or_of_its_type() -> None:
    """Stable Video Diffusion also generates for it."""
    usual = loaded("svd").generate(request_for("svd"))
    faster = loaded("svd").generate(request_for("svd", fps=24))
    assert (usual.resolved["fps"], faster.resolved["fps"]) == (7, 24)
    assert not np.array_equal(usual.frames, faster.frames)
    assert loaded("wan_t2v").generate(request_for("wan_t2v")).resolved["fps"] == 16


@pytest.mark.parametrize("name", NAMES)
def test_single_equals_a_plain_call_of_diffusers(name: str) -> None:
    result = loaded(name).generate(request_for(name))
    want = plain_call(name)
    assert result.frames.shape == want.shape
    assert np.array_equal(result.frames, want)  # the same code on the same device: bit-equal
    assert (result.latents is not None) == TABLE[name].returns_latents


def test_a_vae_with_a_mean_and_a_factor_decodes_as_in_diffusers(tmp_path: Path) -> None:
    """As Playground v2.5's, which is of the class and the type of SDXL."""
    moments = {"latents_mean": [0.5, -1.0, 0.3, 0.0], "latents_std": [2.0, 0.5, 1.3, 0.8]}
    file = "vae/config.json"
    folder = changed(checkpoint("sdxl"), tmp_path / "any", file, scaling_factor=0.5, **moments)
    given = LoadRequest(model_type="sdxl", checkpoint=str(folder), variant="fp32")
    size = {"height": SIDE, "width": SIDE}
    made = load_pipeline(TABLE["sdxl"], given, device=CPU).generate(request_for("sdxl", **size))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pixels = pipe(
        "a photo of a cat",
        negative_prompt="a dog",
        num_inference_steps=3,
        guidance_scale=TABLE["sdxl"].guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
        **size,
    ).images
    assert np.array_equal(made.frames, (pixels * 255).round().astype(np.uint8))


@pytest.mark.parametrize("name", ["sd1", "svd", "wan_t2v"])
def test_image_of_no_numbers_is_an_error_and_the_next_one_is_right(name: str) -> None:
    pipe = loaded(name)
    want = pipe.generate(request_for(name)).frames
    weight = next(getattr(pipe.pipe, TABLE[name].denoiser).parameters())
    kept = weight.data.clone()
    weight.data.fill_(float("inf"))
    try:
        with pytest.raises(UnsupportedError, match=r"not numbers \(NaN\) and would be black"):
            pipe.generate(request_for(name))
    finally:
        weight.data.copy_(kept)
    assert np.array_equal(pipe.generate(request_for(name)).frames, want)


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("flux2", sample_image(5)),
        ("flux2", [sample_image(5), sample_image(6, side=80)]),
        ("flux_kontext", sample_image(5)),
    ],
)
def test_reference_images_reach_the_pipeline(name: str, images: object) -> None:
    result = loaded(name).generate(request_for(name, image=images))
    assert np.array_equal(result.frames, plain_call(name, image=images))
    assert not np.array_equal(result.frames, loaded(name).generate(request_for(name)).frames)


def test_reference_image_that_the_pipeline_refuses_is_the_clients_mistake() -> None:
    with pytest.raises(
        RequestError, match=r"image of 48x48.*at least 64 pixels.*Send another"
    ) as caught:
        loaded("flux2").generate(request_for("flux2", image=[sample_image(side=48)]))
    assert caught.value.field == "image"


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_returned_latents_decode_to_the_returned_image_as_clients_decode(name: str) -> None:
    result = loaded(name).generate(request_for(name))
    vae = load(name).vae
    with torch.no_grad():
        image = vae.decode(
            torch.from_numpy(result.latents)
        ).sample  # a client's VAE knows no scaling
    pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(int) - result.frames).max() <= 1


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_latents_at_strength_zero_come_back_with_the_same_image(name: str) -> None:
    first = loaded(name).generate(request_for(name))
    again = loaded(name).generate(request_for(name, latents=first.latents, strength=0.0))
    assert np.array_equal(again.frames, first.frames)
    assert again.num_steps == 0


@pytest.mark.parametrize("name", ["sdxl", "flux", "pixa"])
def test_more_strength_moves_further_from_the_given_latents(name: str) -> None:
    start = loaded(name).generate(request_for(name, seed=8)).latents
    distances = [
        np.abs(
            loaded(name)
            .generate(request_for(name, latents=start, strength=strength, num_inference_steps=10))
            .latents
            - start
        ).mean()
        for strength in (0.2, 0.9)
    ]
    assert distances[0] < distances[1]


def test_latents_at_full_strength_only_set_the_size() -> None:
    text_only = loaded("sd1").generate(request_for("sd1", height=72, width=64))
    with_latents = loaded("sd1").generate(
        request_for("sd1", latents=np.ones((1, 4, 9, 8), np.float32))
    )
    assert np.array_equal(text_only.frames, with_latents.frames)


def test_progress_is_told_for_every_step_and_an_exception_from_it_ends_the_run() -> None:
    seen: list[tuple[int, int]] = []
    loaded("pixa").generate(
        request_for("pixa"), on_step=lambda step, num_steps, _: seen.append((step, num_steps))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(step: int, num_steps: int, _: torch.Tensor) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        loaded("pixa").generate(request_for("pixa"), on_step=stop)
    assert np.array_equal(
        loaded("pixa").generate(request_for("pixa")).frames,
        loaded("pixa").generate(request_for("pixa")).frames,
    )


def test_a_scheduler_of_one_request_does_not_leak_into_the_next() -> None:
    before = loaded("sd1").generate(request_for("sd1"))
    other = loaded("sd1").generate(request_for("sd1", scheduler={"scheduler": "euler_a"}))
    after = loaded("sd1").generate(request_for("sd1"))
    assert not np.array_equal(before.frames, other.frames)
    assert np.array_equal(before.frames, after.frames)


def test_guidance_zero_is_guidance_off() -> None:
    off = loaded("sd1").generate(request_for("sd1", guidance_scale=0.0))
    one = loaded("sd1").generate(request_for("sd1", guidance_scale=1.0))
    assert np.array_equal(off.frames, one.frames)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_clip_skip_changes_the_image_and_zero_is_absent(name: str) -> None:
    plain = loaded(name).generate(request_for(name))
    assert np.array_equal(
        loaded(name).generate(request_for(name, clip_skip=0)).frames, plain.frames
    )
    assert not np.array_equal(
        loaded(name).generate(request_for(name, clip_skip=1)).frames, plain.frames
    )
    assert not hasattr(
        loaded("sd1").pipe.text_encoder, "text_model"
    )  # LoRA loading would take it for another layout


def test_embeddings_draw_what_their_prompt_draws() -> None:
    pipe = load("sdxl")
    with torch.no_grad():
        positive, negative, pooled, negative_pooled = pipe.encode_prompt(
            "a photo of a cat", negative_prompt="a dog", device=CPU
        )
    given = {
        "prompt_embeds": positive.numpy(),
        "pooled_prompt_embeds": pooled.numpy(),
        "negative_prompt_embeds": negative.numpy(),
        "negative_pooled_prompt_embeds": negative_pooled.numpy(),
    }
    by_embeds = loaded("sdxl").generate(GenerateRequest(seed=3, num_inference_steps=3, **given))
    assert np.array_equal(by_embeds.frames, loaded("sdxl").generate(request_for("sdxl")).frames)


def test_embeddings_of_different_lengths_are_padded() -> None:
    rng = np.random.default_rng(0)
    long, short = (rng.standard_normal((1, length, 32)).astype(np.float32) for length in (154, 77))
    result = loaded("sd1").generate(
        GenerateRequest(
            seed=3, num_inference_steps=2, prompt_embeds=long, negative_prompt_embeds=short
        )
    )
    assert result.frames.shape == (1, SIDE, SIDE, 3)


def test_sizes_are_cut_down_to_what_the_type_allows() -> None:
    assert loaded("sd3").generate(request_for("sd3", height=70, width=90)).frames.shape == (
        1,
        64,
        80,
        3,
    )


REFUSALS = [
    ("sd1", {"prompt": None}, RequestError, "no prompt was given"),
    ("svd", {"image": None}, RequestError, "image is missing"),
    (
        "sd1",
        {"prompt_embeds": np.ones((1, 77, 32), np.float32)},
        RequestError,
        "both prompt and prompt_embeds",
    ),
    (
        "sdxl",
        {"prompt": None, "prompt_embeds": np.ones((1, 77, 64), np.float32)},
        RequestError,
        "has no pooled_output",
    ),
    (
        "hy",
        {"prompt": None, "prompt_embeds": np.ones((1, 77, 32), np.float32)},
        UnsupportedError,
        "embeddings cannot be given",
    ),
    (
        "sd1",
        {"sigmas": [1.0, 0.0], "timesteps": [3]},
        RequestError,
        "sigmas and timesteps exclude",
    ),
    (
        "sd1",
        {"height": 8, "width": 8, "latents": np.ones((1, 3, 8, 8), np.float32), "strength": 0.5},
        RequestError,
        "latent has shape",
    ),
    ("sd3", {"height": 8}, RequestError, "multiples of 16"),
    ("sd3", {"scheduler": "ddim"}, RequestError, "flow-matching"),
    ("sd1", {"scheduler": "no_such_sampler"}, RequestError, "no_such_sampler"),
]


@pytest.mark.parametrize(("name", "fields", "kind", "message"), REFUSALS)
def test_refuses(name: str, fields: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        loaded(name).generate(request_for(name, **fields))


@pytest.mark.parametrize("name", [name for name, spec in TABLE.items() if spec.single_file])
def test_single_file_checkpoint_draws_what_its_folder_draws(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(single_file(name))
    # files of later types have no VAE and not all text encoders: they come from the folder
    is_denoiser_only = name not in ("sd1", "sd2", "sdxl")
    ignored = () if is_denoiser_only else ("*.safetensors",)
    shutil.copytree(checkpoint(name), tmp_path / "model", ignore=shutil.ignore_patterns(*ignored))
    request = LoadRequest(
        model_type=name, checkpoint=str(file), variant="fp32", height=SIDE, width=SIDE
    )
    from_file = load_pipeline(TABLE[name], request, device=CPU).generate(request_for(name))
    assert (
        np.abs(from_file.frames.astype(int) - loaded(name).generate(request_for(name)).frames).max()
        <= 1
    )


def test_a_single_file_without_its_configuration_says_what_to_put_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.symlink_to(single_file("sd1"))
    with pytest.raises(
        ConfigError, match=r"the folder .*model with its configuration .* is not there"
    ):
        load_pipeline(
            TABLE["sd1"],
            LoadRequest(model_type="sd1", checkpoint=str(file), variant="fp32"),
            device=CPU,
        )


def test_half_precision_files_alone_are_found(tmp_path: Path) -> None:
    load("sd1").save_pretrained(tmp_path / "sd1", variant="fp16")
    request = LoadRequest(
        model_type="sd1", checkpoint=str(tmp_path / "sd1"), variant="fp32", height=SIDE, width=SIDE
    )
    pipeline = load_pipeline(TABLE["sd1"], request, device=CPU)
    assert np.array_equal(
        pipeline.generate(request_for("sd1")).frames,
        loaded("sd1").generate(request_for("sd1")).frames,
    )


def test_a_replacement_vae_changes_the_image_and_not_the_latents() -> None:
    other = checkpoint("sd1", seed=5)
    request = LoadRequest(
        model_type="sd1",
        checkpoint=str(checkpoint("sd1")),
        variant="fp32",
        vae=str(other / "vae"),
        height=SIDE,
        width=SIDE,
    )
    with_other = load_pipeline(TABLE["sd1"], request, device=CPU).generate(request_for("sd1"))
    plain = loaded("sd1").generate(request_for("sd1"))
    assert np.array_equal(with_other.latents, plain.latents)
    assert not np.array_equal(with_other.frames, plain.frames)


def test_a_broken_checkpoint_is_a_config_error_that_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint("sd1"), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        ConfigError, match=r"--checkpoint=.*broken/unet/.* cannot be read \(safetensors\)"
    ):
        load_pipeline(
            TABLE["sd1"],
            LoadRequest(model_type="sd1", checkpoint=str(folder), variant="fp32"),
            device=CPU,
        )


def test_vae_slicing_is_switched_on_and_tiling_refused_where_the_vae_has_none() -> None:
    request = LoadRequest(
        model_type="sd1", checkpoint=str(checkpoint("sd1")), variant="fp32", enable_vae_slicing=True
    )
    assert load_pipeline(TABLE["sd1"], request, device=CPU).pipe.vae.use_slicing
    request = LoadRequest(
        model_type="svd", checkpoint=str(checkpoint("svd")), variant="fp32", enable_vae_tiling=True
    )
    with pytest.raises(UnsupportedError, match="enable_tiling is not available"):
        load_pipeline(TABLE["svd"], request, device=CPU)


def test_the_pristine_scheduler_config_is_untouched() -> None:
    config = json.loads((checkpoint("sdxl") / "scheduler" / "scheduler_config.json").read_text())
    loaded("sdxl").generate(
        request_for("sdxl", scheduler={"scheduler": "euler", "timestep_spacing": "trailing"})
    )
    assert (
        loaded("sdxl")._pristine_scheduler.config["timestep_spacing"] == config["timestep_spacing"]
    )


def test_video_of_one_frame_is_guided() -> None:
    """Its ramp of guidance has one value, the request's own."""
    one, eight = (
        loaded("svd")
        .generate(request_for("svd", num_frames=1, guidance_scale=scale, height=128, width=128))
        .frames
        for scale in (1.0, 8.0)
    )
    assert one.shape[0] == 1 and (one != eight).any()


def ended_at(name: str, last: int, request: GenerateRequest):
    def end(step: int, num_steps: int, latents: torch.Tensor) -> None:
        if step == last:
            raise EndRun

    return loaded(name).generate(request, on_step=end)


@pytest.mark.parametrize(("name", "scheduler"), [("sdxl", "euler"), ("flux", None)])
def test_run_that_a_step_ends_has_the_image_that_its_prediction_means(name, scheduler):
    """After the last step that is the whole run's image."""
    asked = request_for(name, **({"scheduler": scheduler} if scheduler else {}))
    whole = loaded(name).generate(asked)
    last = ended_at(name, 3, asked)
    torch.testing.assert_close(
        torch.from_numpy(last.latents), torch.from_numpy(whole.latents), rtol=1e-2, atol=1e-2
    )
    early = ended_at(name, 1, asked)
    assert (early.num_steps, early.report["ended_early"]) == (1, True)
    assert early.frames.shape == whole.frames.shape and "ended_early" not in whole.report
    assert (loaded(name).generate(asked).frames == whole.frames).all()


def test_what_only_the_class_refuses_is_the_clients_mistake():
    """Of a checkpoint whose configurations do not say how wide its embeddings are."""
    wide, narrow, pooled = (
        np.zeros(shape, np.float32) for shape in ((1, 4, 64), (1, 4, 32), (1, 32))
    )
    request = GenerateRequest(
        prompt_embeds=wide, pooled_prompt_embeds=pooled, negative_prompt_embeds=narrow,
        negative_pooled_prompt_embeds=pooled, num_inference_steps=1, seed=1,
    )  # fmt: skip
    pipe = loaded("sdxl")
    known, pipe.spec = pipe.spec, replace(pipe.spec, embeds_widths=(None, None))
    with pytest.raises(RequestError, match=r"refuses this request: .*must have the same shape"):
        pipe.generate(request)
    pipe.spec = known
    assert "check_inputs" not in vars(pipe.pipe)
