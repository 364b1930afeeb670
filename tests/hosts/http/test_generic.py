"""A checkpoint whose class has no row, over a real socket."""

import base64
import io

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from backends.errors import RequestError
from backends.files.generic import generic_spec
from hosts.http.decode import read_request
from hosts.http.limits import Accepted
from hosts.http.media import npy
from tests.checkpoints import checkpoint, sample_image
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
        ({"image": None}, 400, "strength=0.5 has no effect without an image"),
        ({"image": None, "strength": None}, 400, "refuses this request"),
        (
            {"arguments": {"prompt_embeds": {"npy": npy(np.zeros((1, 77, 32), np.float32))}}},
            400,
            "prompt=a photo of a cat and arguments.prompt_embeds do not fit "
            "StableDiffusionPAGImg2ImgPipeline",
        ),
        ({"colour": "red"}, 400, "colour"),
        ({"video": [encoded(sample_image(64))]}, 422, "video is not available"),
        ({"arguments": 3}, 400, "must be an object"),
        (
            {"arguments": {"colour": 1}},
            400,
            "arguments.colour is no argument of ",
        ),
        ({"arguments": {"generator": 1}}, 400, "arguments.generator is no argument"),
        ({"arguments": {"strength": 1}}, 400, "has a field of its own. Send it as strength"),
        ({"arguments": {"pag_scale": 1e9}}, 400, "arguments.pag_scale=1000000000.0 is not allowed"),
        ({"arguments": {"pag_scale": {"png": ""}}}, 400, 'must be a number, a text, {"image"'),
        ({"arguments": {"ip_adapter_image": {"image": "x"}}}, 400, "arguments.ip_adapter_image"),
        (
            {"arguments": {"cross_attention_kwargs": {"object": {"scale": 1e9}}}},
            400,
            "arguments.cross_attention_kwargs.scale=1000000000.0 is not allowed",
        ),
    ],
)
def test_what_the_class_does_not_take_is_refused_by_name(host, fields, status, message):
    answer = host.post(asked(**fields))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["message"]


def test_arguments_without_a_field_reach_the_class(host):
    embeds = npy(np.random.default_rng(0).standard_normal((1, 77, 32)).astype(np.float32))
    scaled = {"cross_attention_kwargs": {"object": {"scale": 1.0}}}
    given = ({}, {"pag_scale": 3.0} | scaled, {"negative_prompt_embeds": {"npy": embeds}})
    plain, same, other = (
        host.post(asked(arguments=each), headers={"Accept": "image/png"}) for each in given
    )
    assert (same.status_code, other.status_code) == (200, 200), (same.text, other.text)
    assert same.content == plain.content  # these are the defaults
    assert other.content != plain.content


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


def test_a_row_that_runs_as_is_fills_a_mask_and_says_what_is_missing():
    """FLUX.1 Fill keeps the size of the image that it changes."""
    mask = Image.new("L", (64, 96), 0)
    mask.paste(255, (0, 0, 32, 96))
    image = sample_image(96).resize((64, 96))
    body = {"prompt": "a cat", "seed": 3, "num_inference_steps": 2, "mask_image": encoded(mask)}
    folder = checkpoint("flux_fill")
    with InProcessHost(checkpoint=str(folder), height=None, width=None) as host:
        answer = host.post(body | {"init_image": encoded(image)}, headers={"Accept": "image/png"})
        assert answer.status_code == 200, answer.text
        assert Image.open(io.BytesIO(answer.content)).size == (64, 96)
        for field, status, message in (
            ({"init_image": ""}, 400, "image is missing. FLUX.1 Fill needs it"),
            ({"init_image": encoded(image), "mask_image": ""}, 400, "mask_image is missing"),
            ({"image": encoded(image), "first_step": 1}, 422, "first_step is not available"),
        ):
            answer = host.post(body | field)
            assert (answer.status_code, message in answer.json()["message"]) == (status, True)


STARTS = {"prompt": "a cat", "seed": 3, "num_inference_steps": 4, "strength": 0.5}
"""Of an image to be changed by a class that a row of another class also runs."""


def changed_by_diffusers(folder, image):
    """uint8 [64, 64, 3] of what diffusers' own class makes of STARTS."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    given = {name: value for name, value in STARTS.items() if name != "seed"}
    output = pipe(**given, image=image, generator=torch.Generator().manual_seed(3))
    return np.asarray(output.images[0]).astype(int)


def pixels_of(answer):
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)


def test_a_folder_that_a_row_of_another_class_runs_does_what_its_own_class_does():
    folder, image = variant("StableDiffusionImg2ImgPipeline"), sample_image(64)
    want = changed_by_diffusers(folder, image)
    png = {"Accept": "image/png"}
    with InProcessHost(checkpoint=str(folder), height=64, width=64) as host:
        got = host.post(STARTS | {"image": encoded(image)}, headers=png)
        assert np.array_equal(pixels_of(got), want)
        for fields in ({}, {"stop_step": 3}):
            by_row = host.post(STARTS | {"init_image": encoded(image)} | fields, headers=png)
            assert (pixels_of(by_row) != want).any()  # it takes the middle of what the VAE says
        text = host.post({"prompt": "a cat", "seed": 3, "num_inference_steps": 2}, headers=png)
        assert pixels_of(text).shape == (64, 64, 3)
        refused = host.post(STARTS | {"image": encoded(image), "stop_step": 3})
        assert refused.status_code == 422 and "image is not available" in refused.json()["message"]
        document = session().get(host.url("/openapi.json"), timeout=20).json()
        fields = document["components"]["schemas"]["Request"]["properties"]
        assert {"image", "init_image", "arguments", "sigmas"} <= fields.keys()


@pytest.mark.slow
def test_two_ranks_do_what_the_own_class_of_the_folder_does():
    folder, image = variant("StableDiffusionImg2ImgPipeline"), sample_image(64)
    want = changed_by_diffusers(folder, image)
    with start_launcher(f"--checkpoint={folder}", "--nproc_per_node=2", "--height=64") as several:
        several.wait_until_ready()
        got = several.post(STARTS | {"image": encoded(image)}, headers={"Accept": "image/png"})
        assert np.abs(pixels_of(got) - want).max() <= 1


def test_a_video_may_have_a_strength():
    spec = generic_spec(variant("CogVideoXVideoToVideoPipeline"))
    body = {"prompt": "a cat", "strength": 0.6, "video": [encoded(sample_image(64))] * 5}
    request = read_request(body, spec=spec, accepted=Accepted())
    assert (request.strength, len(request.video)) == (0.6, 5)
    with pytest.raises(RequestError, match="has no effect without an image"):
        read_request(body | {"video": None}, spec=spec, accepted=Accepted())
