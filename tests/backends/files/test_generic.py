"""What is read of a checkpoint whose pipeline class has no row in the model table."""

import json
from pathlib import Path

import pytest

from backends import planner
from backends.errors import ConfigError, PlanError, RequestError
from backends.files.checkpoint import infer_type
from backends.files.generic import facts_of, generic_spec, require_own_arguments, why_not
from backends.files.pipeline_calls import PipelineCall, pipeline_call, size_multiple
from backends.model_table import GENERIC, ModelSpec, read_table


def folder(tmp_path: Path, name: object, **components: list[str]) -> Path:
    index = {"_class_name": name, "_diffusers_version": "0.42.1", **components}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


FLUX = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "X"]}


def test_a_folder_whose_class_has_no_row_is_generic_and_one_with_a_row_is_not(tmp_path):
    control = folder(tmp_path, "FluxControlPipeline", **FLUX)
    assert infer_type(control, read_table()) == (
        GENERIC,
        "type=generic: a FluxControlPipeline has no row in the model table",
    )
    assert infer_type(folder(tmp_path, "FluxPipeline"), read_table())[0] == "flux"


def test_arguments_and_defaults_are_those_of_the_class(tmp_path):
    spec = generic_spec(folder(tmp_path, "FluxKontextPipeline", **FLUX))
    assert (spec.denoisers, spec.output, spec.requires) == (("transformer",), "image", ("prompt",))
    assert (spec.num_inference_steps, spec.guidance_scale) == (28, 3.5)
    assert {"image", "height", "guidance_scale"} <= set(spec.takes)
    assert not {"mask_image", "strength", "negative_prompt", "num_frames"} & set(spec.takes)


def test_true_guidance_is_the_scale_where_it_is_on_by_default(tmp_path):
    spec = generic_spec(
        folder(
            tmp_path,
            "QwenImageEditPipeline",
            transformer=["diffusers", "QwenImageTransformer2DModel"],
        )
    )
    assert spec.guidance_argument == "true_cfg_scale"
    assert "negative_prompt" in spec.takes


def test_a_video_class_with_two_denoisers(tmp_path):
    model = ["diffusers", "WanTransformer3DModel"]
    spec = generic_spec(
        folder(
            tmp_path,
            "WanImageToVideoPipeline",
            transformer=model,
            transformer_2=model,
            text_encoder=["transformers", "UMT5EncoderModel"],
        )
    )
    assert (spec.output, spec.denoisers) == ("video", ("transformer", "transformer_2"))
    assert spec.requires == ("prompt", "image")
    assert (spec.height, spec.width, spec.num_frames) == (480, 832, 81)


@pytest.mark.parametrize(
    ("vae", "variant"), [("AutoencoderKLWan", "fp32"), ("AutoencoderKLMochi", "")]
)
def test_a_vae_that_loses_too_much_in_half_precision_is_not_converted(tmp_path, vae, variant):
    given = {"transformer": ["diffusers", "SanaVideoTransformer3DModel"], "vae": ["diffusers", vae]}
    assert generic_spec(folder(tmp_path, "SanaVideoPipeline", **given)).vae_variant == variant


def test_an_argument_without_a_field_must_be_among_the_arguments(tmp_path):
    spec = generic_spec(folder(tmp_path, "DiTPipeline"))
    assert spec.requires == ("arguments.class_labels",)
    assert "arguments" in spec.takes
    assert facts_of(pipeline_call("DiTPipeline"))[1][-1] == "arguments (class_labels)"
    require_own_arguments({"class_labels": [1]}, spec)
    with pytest.raises(RequestError, match="Send it as num_inference_steps"):
        require_own_arguments({"num_inference_steps": 2}, spec)
    with pytest.raises(RequestError, match=r"no argument of DiTPipeline\. Allowed: class_labels"):
        require_own_arguments({"output_type": "pt"}, spec)


def test_rows_of_images_are_among_the_arguments(tmp_path):
    spec = generic_spec(folder(tmp_path, "VisualClozePipeline"))
    needed = ("arguments.task_prompt", "arguments.content_prompt", "arguments.image")
    assert spec.requires == needed
    assert "image" not in spec.takes
    require_own_arguments({"image": [[{"image": ""}, None]], "task_prompt": ""}, spec)


def test_frames_and_the_last_frame(tmp_path):
    spec = generic_spec(folder(tmp_path, "SkyReelsV2DiffusionForcingVideoToVideoPipeline"))
    assert "video" in spec.requires
    assert generic_spec(folder(tmp_path, "WanImageToVideoPipeline")).images == 2


def test_a_class_is_refused_for_what_no_request_can_bring():
    call = PipelineCall(
        required=("prompt", "judge"),
        annotations={"judge": "Callable[[Video], None]"},
        returns=("images",),
    )
    assert why_not(call).startswith("needs judge (Callable[[Video], None]), and no field")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoSuchPipeline", "NoSuchPipeline, which the installed diffusers does not have"),
        (["my_pipeline", "MyPipeline"], "Code that comes with a checkpoint is not run"),
        ("StableAudioPipeline", "makes audios and neither images nor videos"),
        ("KandinskyV22PriorPipeline", "makes image_embeds, negative_image_embeds and neither"),
        ("LEditsPPPipelineStableDiffusion", "edits what a call of another of its methods has left"),
    ],
)
def test_rejects_classes_that_cannot_be_asked(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        generic_spec(folder(tmp_path, name))


def generic(tmp_path, transformer: str) -> tuple[ModelSpec, dict[str, object]]:
    """Return the spec of a folder with this transformer, and the options that name the folder."""
    path = folder(tmp_path, "FluxControlPipeline", transformer=["diffusers", transformer])
    (path / "transformer").mkdir()
    config = {"_class_name": transformer, "num_attention_heads": 4, "num_layers": 2}
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    return generic_spec(path), {"checkpoint": str(path)}


def test_xdit_spreads_the_tokens_of_known_transformers_only(tmp_path):
    spec, options = generic(tmp_path, "FluxTransformer2DModel")
    plan = planner("xdit")(spec, {**options, "ulysses_degree": 2}, 2)
    assert plan.degree("ulysses") == 2
    for degree in ("pipefusion_parallel_degree", "data_parallel_degree"):
        with pytest.raises(PlanError, match="without one xdit splits guidance"):
            planner("xdit")(spec, {**options, degree: 2}, 2)
    unet = generic_spec(folder(tmp_path, "FluxControlPipeline", unet=["diffusers", "UNetX"]))
    assert "a single transformer" in unet.supports("xdit").reason


def test_xdit_names_the_transformers_that_it_knows(tmp_path):
    spec, options = generic(tmp_path, "PRXTransformer2DModel")
    with pytest.raises(PlanError, match=r"blocks of a PRXTransformer2DModel are not known.*Flux2"):
        planner("xdit")(spec, {**options, "ulysses_degree": 2}, 2)


def modular(tmp_path: Path, name: str, **entries: object) -> Path:
    index = {"_class_name": name, **entries}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_call_of_a_modular_pipeline_is_that_of_its_blocks(tmp_path):
    (tmp_path / "transformer").mkdir()
    where = {"pretrained_model_name_or_path": "acme/flux", "subfolder": "transformer"}
    transformer = ["diffusers", "Flux2Transformer2DModel", where]
    lacking = generic_spec(modular(tmp_path, "QwenImageModularPipeline", controlnet=[None] * 3))
    assert "image" in lacking.takes and "control_image" not in lacking.takes
    given = modular(tmp_path, "Flux2KleinBaseModularPipeline", transformer=transformer)
    assert infer_type(given, read_table())[0] == GENERIC
    spec = generic_spec(given)
    assert (spec.title, spec.denoisers) == ("Flux2KleinBaseModularPipeline", ("transformer",))
    assert {"prompt", "image", "num_inference_steps", "guidance_scale"} <= set(spec.takes)
    assert spec.guidance_scale == 4  # of the guider, which no call takes
    assert (spec.num_inference_steps, spec.output) == (50, "image")


@pytest.mark.parametrize(
    ("name", "entries", "told"),
    [
        ("AcmeModularPipeline", {}, "AcmeModularPipeline, which the installed diffusers does not"),
        ("Flux2ModularPipeline", {"_blocks_class_name": "AcmeBlocks"}, "made of AcmeBlocks, which"),
        (
            "Flux2ModularPipeline",
            {"vae": ["diffusers", "X", {"pretrained_model_name_or_path": "a/b", "subfolder": ""}]},
            "takes its vae from a/b",
        ),
        (
            "Flux2ModularPipeline",
            {"_blocks_class_name": "DDIMScheduler"},
            "whose blocks do not say what they take",
        ),
        (
            "Flux2ModularPipeline",
            {"vae": ["diffusers", "AutoencoderKLFlux2", {"type_hint": ["its_own", "X"]}]},
            "its vae from its_own.X, which is in neither diffusers nor transformers",
        ),
        (
            "Flux2ModularPipeline",
            {"controlnet": [None, None, {"type_hint": ["its_own", "X"]}]},
            "its controlnet from its_own.X",
        ),
        ("Flux2ModularPipeline", {"_blocks_class_name": ["x"]}, "names no modular pipeline"),
        ("MiniMaxMusic3ModularPipeline", {}, "makes audios and neither images nor videos"),
    ],
)
def test_modular_pipeline_that_cannot_run_is_refused_by_name(tmp_path, name, entries, told):
    with pytest.raises(ConfigError, match=told):
        generic_spec(modular(tmp_path, name, **entries))


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("CogView4Pipeline", 16),
        ("LTXPipeline", 32),
        ("AllegroPipeline", 8),
        ("FluxPipeline", 1),
        ("StableDiffusionImg2ImgPipeline", 1),
    ],
)
def test_a_class_says_which_sizes_it_refuses(name, multiple):
    """FLUX only warns, and img2img has no size of its own."""
    assert size_multiple(name) == multiple
