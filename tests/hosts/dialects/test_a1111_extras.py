"""Upscalers in A1111's API on a real host: lists, extra-single-image and hires fix."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image

from backends.loading.upscaling.upscaler import Upscaler
from tests.backends.loading.upscaling.weights import saved
from tests.checkpoints import checkpoint, sample_image
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of
from tests.hosts.harness import run_launcher, session
from tests.hosts.inprocess import InProcessHost
from tests.hosts.sending import from_file

EXTRAS = "/sdapi/v1/extra-single-image"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("upscalers")
    saved(made, "today.safetensors").rename(made / "Sharp.safetensors")
    saved(made, "layers.pth", fold=1).rename(made / "old.pth")
    (made / "readme.txt").write_text("no weights")
    return made


@pytest.fixture(scope="module")
def host(folder):
    with InProcessHost(
        type="sdxl", checkpoint=str(checkpoint("sdxl")), upscalers=str(folder), max_side="600"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def network(folder):
    path = str(folder / "Sharp.safetensors")
    return Upscaler(path, device=torch.device("cpu"), dtype=torch.float32)


def post(host, path, body):
    return session().post(host.url(path), json=body, timeout=60)


def enlarged(host, **fields):
    answer = post(host, EXTRAS, {"image": encode_file(sample_image(24)), **fields})
    assert answer.status_code == 200, answer.text
    return from_file(answer.json()["image"])


def by_network(network, image):
    return network.enlarge(np.asarray(image)[None])[0]


def test_upscalers_are_listed_by_their_files_names(host):
    answer = session().get(host.url("/sdapi/v1/upscalers"), timeout=20).json()
    assert [one["name"] for one in answer] == ["None", "Lanczos", "Nearest", "Sharp", "old"]


def test_image_is_enlarged_by_the_network_and_resized_to_the_factor(host, network):
    whole = by_network(network, sample_image(24))
    assert (enlarged(host, upscaler_1="Sharp", upscaling_resize=4) == whole).all()
    half = Image.fromarray(whole).resize((48, 48), Image.Resampling.LANCZOS)
    assert (enlarged(host, upscaler_1="sharp", upscaling_resize=2) == np.asarray(half)).all()
    twice = Image.fromarray(by_network(network, whole)).resize((192, 192), Image.Resampling.LANCZOS)
    assert (enlarged(host, upscaler_1="Sharp", upscaling_resize=8) == np.asarray(twice)).all()


def test_image_is_resized_without_a_network(host):
    near = sample_image(24).resize((72, 72), Image.Resampling.NEAREST)
    assert (enlarged(host, upscaler_1="Nearest", upscaling_resize=3) == np.asarray(near)).all()
    assert enlarged(host).shape == (48, 48, 3)


def test_image_covers_a_size_and_is_cropped_to_it(host):
    size = {"resize_mode": 1, "upscaling_resize_w": 64, "upscaling_resize_h": 40}
    assert enlarged(host, upscaler_1="Sharp", **size).shape == (40, 64, 3)
    assert enlarged(host, upscaler_1="Sharp", upscaling_crop=False, **size).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"upscaler_1": "SwinIR 4x"}, 400, "Allowed: None, Lanczos, Nearest, Sharp, old."),
        ({"upscaler_2": "Sharp"}, 422, "one upscaler is used"),
        ({"gfpgan_visibility": 1}, 422, "face restoration is not supported"),
        ({"upscaling_resize": 9}, 400, "upscaling_resize=9 is not allowed. Allowed: 1 to 8."),
        ({"upscaling_resize": "big"}, 400, "upscaling_resize='big' is not allowed"),
        ({"resize_mode": 2}, 400, "resize_mode=2"),
        ({"image": ""}, 400, "image is missing"),
        ({"resize_mode": 1, "upscaling_resize_w": 700}, 400, "Allowed: sides up to 600"),
        ({"colour": 1}, 400, "colour is not a field"),
    ],
)
def test_what_cannot_be_done_is_refused(host, fields, status, said):
    answer = post(host, EXTRAS, {"image": encode_file(sample_image(24)), **fields})
    assert answer.status_code == status and said in answer.json()["detail"], answer.text


def test_hires_fix_starts_its_second_pass_from_the_networks_image(host, network):
    fields = {"prompt": "a red car", "seed": 5, "steps": 3, "width": 64, "height": 64}
    hires = {"enable_hr": True, "hr_upscaler": "Sharp", "hr_scale": 1.5, "denoising_strength": 0.5}
    answer = post(host, "/sdapi/v1/txt2img", {**fields, **hires})
    assert answer.status_code == 200, answer.text
    first = from_file(post(host, "/sdapi/v1/txt2img", fields).json()["images"][0])
    start = Image.fromarray(by_network(network, first.astype(np.uint8)))
    start = start.resize((96, 96), Image.Resampling.LANCZOS)
    by_hand = post(
        host,
        "/sdapi/v1/img2img",
        {**fields, "width": 96, "height": 96, "init_images": [encode_file(start)],
         "denoising_strength": 0.5},
    )  # fmt: skip
    wanted = from_file(by_hand.json()["images"][0])
    assert (from_file(answer.json()["images"][0]) == wanted).all()
    assert "Hires upscaler: Sharp" in answer.json()["info"]


def test_a_job_is_enlarged_and_its_latents_are_not(host, network):
    fields = {"prompt": "a red car", "seed": 5, "num_inference_steps": 2, "strict": True}
    large = host.post({**fields, "upscaler": "Sharp"}, headers={"Accept": "image/png"})
    small = host.post(fields, headers={"Accept": "image/png"})
    wanted = by_network(
        network, from_file(base64.b64encode(small.content).decode()).astype("uint8")
    )
    assert (from_file(large.content) == wanted).all()
    refused = post(host, "/v1/jobs", {"prompt": "x", "upscaler": "other"})
    assert refused.status_code == 400
    assert "Allowed: Sharp, old." in refused.json()["message"]


def test_a_host_without_upscalers_says_so_and_bad_files_end_the_launch(tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_launcher("--type=sdxl", f"--upscalers={tmp_path / 'empty'}", "--check")
    assert (
        done.returncode == 2 and "is neither a file of weights nor a folder of them" in done.stderr
    )
    done = run_launcher("--type=sdxl", f"--upscalers={tmp_path / 'missing.pth'}", "--check")
    assert done.returncode == 2 and "does not exist" in done.stderr


def test_an_upscaler_without_room_is_refused_before_the_job_is_taken(folder):
    sides = {"width": 4096, "height": 2048}  # 4 x makes 134 megapixels
    with ReadingHost(upscalers=str(folder), max_side=4096) as host:
        for path, fields in (
            ("/v1/jobs", {**sides, "upscaler": "Sharp"}),
            ("/v1/jobs", {**sides, "upscaler": "old"}),
            ("/generate", {**sides, "upscaler": "Sharp"}),
            ("/v1/images/generations", {"size": "4096x2048", "upscaler": "Sharp"}),
        ):
            answer = host.post(path, {"prompt": "a", **fields})
            assert answer.status_code == 400, path
            assert "4096x2048 would become one of 16384x8192" in message_of(answer)
        small = {"prompt": "a", "upscaler": "Sharp", "width": 4096, "height": 1024}
        assert host.reads("/v1/jobs", small)[0].upscaler == "Sharp"
