"""A checkpoint whose class has no row, over a real socket."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import sample_image
from tests.checkpoints.variants import variant
from tests.hosts.harness import session, start_launcher
from tests.hosts.inprocess import InProcessHost


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def host():
    folder = variant("StableDiffusionPAGImg2ImgPipeline")
    with InProcessHost(checkpoint=str(folder), height=None, width=None) as running:
        yield running


def asked(**fields):
    return {
        "prompt": "a photo of a cat",
        "seed": 3,
        "image": encoded(sample_image(64)),
        "num_inference_steps": 4,
        "strength": 0.5,
        **fields,
    }


def test_an_image_is_made_with_the_arguments_of_the_class(host):
    one, two = (
        host.post(asked(**fields), headers={"Accept": "image/png"})
        for fields in ({}, {"strength": 1.0})
    )
    assert (one.status_code, two.status_code) == (200, 200), one.text
    pixels = [np.asarray(Image.open(io.BytesIO(each.content))) for each in (one, two)]
    assert pixels[0].shape == (64, 64, 3)
    assert (pixels[0] != pixels[1]).any()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        (
            {"mask_image": encoded(sample_image(64))},
            422,
            "mask_image is not available: StableDiffusionPAGImg2ImgPipeline does not take it",
        ),
        ({"height": 128}, 422, "height is not available"),
        ({"sigmas": [1.0, 0.0]}, 422, "sigmas is not available"),
        ({"prompt": ""}, 400, "prompt is missing"),
        ({"image": None}, 400, "refuses this request"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_what_the_class_does_not_take_is_refused_by_name(host, fields, status, message):
    answer = host.post(asked(**fields))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["message"]


def test_the_fields_of_the_class_are_documented(host):
    document = session().get(host.url("/openapi.json"), timeout=20).json()
    fields = document["components"]["schemas"]["Request"]["properties"]
    assert {"image", "strength", "prompt", "negative_prompt"} <= fields.keys()
    assert not {"mask_image", "height", "num_frames", "lora"} & fields.keys()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--mode=throughput",)])
def test_two_ranks_make_the_same_image_as_one(host, options):
    want = host.post(asked(), headers={"Accept": "image/png"}).content
    folder = variant("StableDiffusionPAGImg2ImgPipeline")
    with start_launcher(f"--checkpoint={folder}", "--nproc_per_node=2", *options) as several:
        several.wait_until_ready()
        got = several.post(asked(), headers={"Accept": "image/png"})
        assert got.status_code == 200, got.text
        one, two = (np.asarray(Image.open(io.BytesIO(each))) for each in (want, got.content))
        assert np.abs(one.astype(int) - two).max() <= 1
        refused = several.post(asked(mask_image=encoded(sample_image(64))))
        assert refused.status_code == 422
