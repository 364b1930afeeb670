"""What is read of a checkpoint whose pipeline class has no row in the model table."""

import json
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.files.checkpoint import infer_type
from backends.files.generic import generic_spec
from backends.model_table import GENERIC, read_table


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
    ("name", "message"),
    [
        ("NoSuchPipeline", "NoSuchPipeline, which the installed diffusers does not have"),
        (["my_pipeline", "MyPipeline"], "Code that comes with a checkpoint is not run"),
        ("StableAudioPipeline", "makes audios and neither images nor videos"),
        ("KandinskyV22PriorPipeline", "makes image_embeds, negative_image_embeds and neither"),
        ("KandinskyV22Pipeline", r"needs image_embeds \(torch.Tensor.*no field of a request"),
        ("DiTPipeline", r"needs class_labels \(list\[int\]\), and no field of a request"),
    ],
)
def test_rejects_classes_that_cannot_be_asked(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        generic_spec(folder(tmp_path, name))
