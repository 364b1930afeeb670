"""What a pipeline class of diffusers would refuse is refused before any rank sees it: each kind of
rule that its source has, by the field as it was sent.
"""

import json

import numpy as np
import pytest
from PIL import Image

from backends.errors import ConfigError, RequestError
from backends.files.generic import generic_spec
from backends.files.pipeline_calls import exported_pipelines, needed_components, pipeline_call
from backends.generation.admission import AtLaunch, require_possible
from backends.model_table import read_table
from backends.request import GenerateRequest
from hosts.http.media import npy

IMAGE = Image.new("RGB", (64, 64))
A = {"prompt": "a"}
SR = {"prompt": "a", "video": [IMAGE] * 5}
SETTINGS = {"boundary_ratio": None}
"""Of the pipeline itself, as diffusers saves them."""
VAE = {"vae": {"block_out_channels": [8, 8, 8, 8]}}


def tensor(*shape):
    return {"npy": npy(np.zeros(shape, np.float32))}


def spec_of(name, folder, configs=None):
    index = {part: ["diffusers", kind] for part, kind in needed_components(name).items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **index, **SETTINGS}))
    for part, config in (configs or {}).items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return generic_spec(folder)


REFUSED = {
    "a number to divide by": (
        "StableDiffusionXLPAGPipeline", {**A, "height": 60, "width": 64},
        "height=60 and width=64 do not fit .*divisible by 8 but are 60 and 64", "height",
    ),
    "the same of the checkpoint": (
        "AuraFlowPipeline", {**A, "height": 64, "width": 72},
        "height=64 and width=72 do not fit .*divisible by 16 but are 64 and 72", "height",
    ),
    "two that exclude each other": (
        "HeliosPyramidPipeline", {**A, "image": IMAGE, "video": [IMAGE] * 5},
        "image and video do not fit .*cannot be provided simultaneously", "image",
    ),
    "a field and an argument that exclude each other": (
        "StableDiffusionPAGPipeline", {**A, "arguments": {"prompt_embeds": tensor(1, 4, 8)}},
        "prompt='?a'? and arguments.prompt_embeds do not fit", "prompt",
    ),
    "two that belong together": (
        "SanaWMPipeline", {**A, "image": IMAGE, "arguments": {}},
        "arguments.c2w is missing: .*exactly one of `c2w` or `action`", "arguments.c2w",
    ),
    "a length": (
        "BriaPipeline", {**A, "arguments": {"max_sequence_length": 513}},
        "arguments.max_sequence_length=513 does not fit .*greater than 512",
        "arguments.max_sequence_length",
    ),
    "one of a few": (
        "Kandinsky6SRPipeline", {**SR, "arguments": {"resolution_scale": 3}},
        "arguments.resolution_scale=3 does not fit", "arguments.resolution_scale",
    ),
    "a type": (
        "StableDiffusionAttendAndExcitePipeline", {**A, "arguments": {"token_indices": "two"}},
        "arguments.token_indices=two does not fit .*list of ints", "arguments.token_indices",
    ),
    "the type of an array": (
        "VisualClozeGenerationPipeline",
        {**A, "arguments": {"task_prompt": tensor(1, 4), "content_prompt": "a", "image": []}},
        "must be str or list, got Tensor", "arguments.task_prompt",
    ),
    "a number of dims": (
        "StableDiffusionPAGPipeline",
        {**A, "arguments": {"ip_adapter_image_embeds": [tensor(1, 4)]}},
        "3D or 4D tensors but is 2D", "arguments.ip_adapter_image_embeds",
    ),
    "two that need an order": (
        "StableDiffusionXLControlNetUnionPipeline",
        {**A, "control_image": IMAGE, "control_guidance_start": 0.9, "control_guidance_end": 0.2},
        "control_guidance_start=0.9 is not before control_guidance_end=0.2",
        "control_guidance_start",
    ),
    "a range": (
        "Kandinsky6SRPipeline", {**SR, "arguments": {"min_overlap": 1}},
        "arguments.min_overlap=1 does not fit", "arguments.min_overlap",
    ),
    "a setting of the checkpoint": (
        "WanVACEPipeline", {**A, "arguments": {"guidance_scale_2": 2.0}},
        "arguments.guidance_scale_2=2.0 does not fit .*boundary_ratio",
        "arguments.guidance_scale_2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "said", "field"), REFUSED.values(), ids=REFUSED)
def test_what_the_class_refuses_is_refused_by_its_name(name, fields, said, field, tmp_path):
    spec = spec_of(name, tmp_path, VAE)
    for names, told in (({}, field), ({field: "theirs"}, "theirs")):
        with pytest.raises(RequestError, match=said if not names else "theirs") as refused:
            require_possible(GenerateRequest(**fields), spec, AtLaunch(), names)
        assert refused.value.field == told and told in str(refused.value)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("StableDiffusionXLPAGPipeline", {**A, "height": 64, "width": 72}),
        ("AuraFlowPipeline", {**A, "height": 64, "width": 80}),
        ("HeliosPyramidPipeline", {**A, "video": [IMAGE] * 5}),
        ("BriaPipeline", {**A, "arguments": {"max_sequence_length": 512}}),
        (
            "StableDiffusionAttendAndExcitePipeline",
            {**A, "arguments": {"token_indices": [1, 2], "max_iter_to_alter": 1}},
        ),
        (
            "StableDiffusionPAGPipeline",
            {**A, "arguments": {"ip_adapter_image_embeds": [tensor(1, 1, 4)]}},
        ),
    ],
)
def test_what_the_class_takes_passes(name, fields, tmp_path):
    require_possible(GenerateRequest(**fields), spec_of(name, tmp_path, VAE), AtLaunch())


def test_what_only_the_checkpoint_decides_passes_where_it_does_not_say(tmp_path):
    spec = spec_of("AuraFlowPipeline", tmp_path)
    require_possible(GenerateRequest(**A, height=60, width=60), spec, AtLaunch())


def test_rows_that_run_as_they_are_have_the_rules_of_their_class():
    asked = {**A, "arguments": {"max_sequence_length": 5000}}
    with pytest.raises(RequestError, match=r"5000 does not fit Bria 3\.2") as refused:
        require_possible(GenerateRequest(**asked), read_table()["bria"], AtLaunch())
    assert refused.value.field == "arguments.max_sequence_length"


NEEDS_A_PAIR = {
    "Cosmos3OmniPipeline", "CosmosVideoToWorldPipeline", "HeliosPipeline", "HeliosPyramidPipeline",
}  # fmt: skip
"""They take an image or a video, not both."""


def test_no_class_refuses_a_plain_request(tmp_path):
    """Of the classes that need nothing but fields."""
    number = 0
    for name in exported_pipelines():
        if pipeline_call(name) is None or name in NEEDS_A_PAIR:
            continue
        folder = tmp_path / name
        folder.mkdir()
        try:
            spec = spec_of(name, folder)
        except ConfigError:  # it cannot be asked over HTTP
            continue
        asked = {
            **A, "negative_prompt": "b", "num_inference_steps": 4, "guidance_scale": 3.0,
            "height": 64, "width": 64, "num_frames": 5, "image": IMAGE, "mask_image": IMAGE,
            "control_image": IMAGE, "strength": 0.6, "video": [IMAGE] * 5,
        }  # fmt: skip
        asked = {field: value for field, value in asked.items() if field in spec.takes}
        try:
            require_possible(GenerateRequest(**asked), spec, AtLaunch())
        except RequestError as error:
            assert str(error.field).startswith("arguments."), (name, error)
        else:
            number += 1
    assert number > 200
