"""A1111's hires fix and masked area: what is generated, and what comes back."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hosts.dialects.a1111_passes import LATENT_UPSCALERS, filled, masked_area
from hosts.jobs.serialization import fingerprint
from tests.hosts.application import encode_file
from tests.hosts.dialects.reading import ReadingHost, message_of

TXT, IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
SIZE = {"width": 24, "height": 16}
"""Of every image that a ReadingHost gives."""


@pytest.fixture(scope="module")
def host():
    with ReadingHost() as running:
        yield running


def passes(host, **fields):
    body = {"prompt": "a", "seed": 5, "steps": 8, **SIZE, "enable_hr": True, **fields}
    return host.reads(TXT, body)


def test_second_pass_starts_from_the_first_image_at_twice_its_size(host):
    first, second = passes(host)
    assert (first.width, first.height, first.latents, first.strength) == (24, 16, None, 1)
    assert (second.width, second.height, second.seed) == (48, 32, 5)
    assert second.latents.shape == (1, 4, 4, 6) and second.init_image is None
    assert (second.strength, second.num_inference_steps) == (0.75, 8)


@pytest.mark.parametrize("name", ["Lanczos", "Nearest", "None", "nearest"])
def test_image_upscalers_enlarge_the_image(host, name):
    _, second = passes(host, hr_upscaler=name, hr_scale=1.5, height=16, width=32)
    assert second.latents is None and second.init_image.size == (48, 24)
    assert (second.width, second.height) == (48, 24)


def test_second_pass_has_its_own_settings(host):
    first, second = passes(
        host, hr_resize_x=72, hr_second_pass_steps=3, denoising_strength=0.4, hr_prompt="(b:1.2)",
        hr_negative_prompt="c", hr_sampler_name="Euler a", hr_scheduler="Use same scheduler",
        hr_cfg=3, sampler_name="DPM++ 2M", cfg_scale=7,
    )  # fmt: skip
    assert (second.width, second.height) == (72, 48)
    assert (second.num_inference_steps, second.strength, second.guidance_scale) == (3, 0.4, 3)
    assert (second.prompt, second.negative_prompt) == ("(b:1.2)", "c")
    assert second.prompt_syntax == "a1111" and second.scheduler == {"scheduler": "euler_a"}
    assert (first.prompt, first.guidance_scale, first.scheduler) == (
        "a", 7, {"scheduler": "dpmpp_2m"},
    )  # fmt: skip


def test_each_of_several_images_has_two_passes(host):
    found = passes(host, n_iter=2)
    assert [(one.seed, one.width) for one in found] == [(5, 24), (6, 24), (5, 48), (6, 48)]


def test_settings_of_the_second_pass_are_told(host):
    body = {"prompt": "a", **SIZE, "enable_hr": True, "hr_second_pass_steps": 2}
    info = json.loads(host.post(TXT, body).get_json()["info"])
    text = info["infotexts"][0]
    for fact in ("Size: 24x16", "Hires upscale: 2", "Hires steps: 2", "Hires upscaler: Latent",
                 "Denoising strength: 0.75"):  # fmt: skip
        assert fact in text
    plain = json.loads(host.post(TXT, {"prompt": "a"}).get_json()["info"])
    assert "Hires" not in plain["infotexts"][0]


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"hr_upscaler": "R-ESRGAN 4x+"}, 400, "hr_upscaler='R-ESRGAN 4x+' is not an upscaler"),
        ({"hr_scale": 0.5}, 400, "hr_scale=0.5 is not allowed"),
        ({"hr_scale": "big"}, 400, "hr_scale='big' is not allowed"),
        ({"hr_scale": 1.1}, 400, "is not a size of"),
        ({"hr_resize_x": 48, "hr_resize_y": 48}, 422, "they change the shape of 24x16"),
        ({"hr_second_pass_steps": -1}, 400, "hr_second_pass_steps=-1"),
        ({"denoising_strength": 2}, 400, "denoising_strength"),
        ({"hr_checkpoint_name": "other"}, 422, "hr_checkpoint_name='other' is not available"),
        ({"hr_sampler_name": "none"}, 400, "sampler_name='none' is not a sampler"),
        ({"hr_prompt": "a AND b"}, 422, "prompt has 'AND'"),
    ],
)
def test_second_pass_that_cannot_be_done_is_refused_before_the_first(host, fields, status, said):
    before = len(host.requests)
    answer = host.post(TXT, {"prompt": "a", **SIZE, "enable_hr": True, **fields})
    assert answer.status_code == status and said in message_of(answer)
    assert len(host.requests) == before
    off = host.post(TXT, {"prompt": "a", "hr_upscaler": "R-ESRGAN 4x+", "hr_scale": 0.5})
    assert off.status_code == 200


@pytest.mark.parametrize(
    ("name", "mode", "antialias"),
    [("Latent", "bilinear", False), ("Latent (antialiased)", "bilinear", True),
     ("Latent (bicubic antialiased)", "bicubic", True), ("Latent (nearest-exact)", "nearest-exact",
                                                         False)],
)  # fmt: skip
def test_latents_are_enlarged_as_torch_does_it(host, name, mode, antialias):
    from backends.request import GenerateResult
    from hosts.dialects.a1111_passes import Hires

    latents = np.random.default_rng(0).standard_normal((1, 4, 5, 6)).astype(np.float32)
    first = GenerateResult(
        frames=np.zeros((1, 40, 48, 3), np.uint8), latents=latents, seed=1, num_steps=1,
        exactness="exact", seconds=0.0,
    )  # fmt: skip
    hires = Hires(width=96, height=80, upscaler=name, fields={}, sent_as={}, facts={})
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(latents), (10, 12), mode=mode, antialias=antialias
    )
    assert name in LATENT_UPSCALERS
    np.testing.assert_allclose(hires.start(first)["latents"], wanted.numpy(), atol=1e-5)


def area_mask(size, box):
    mask = Image.new("RGB", size)
    mask.paste("white", box)
    return mask


def image_of(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer.get_json()["images"][0])))


def test_masked_area_is_generated_at_the_requested_size_and_put_back(host):
    noise = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = area_mask((90, 60), (40, 20, 52, 28))
    body = {
        "prompt": "a", **SIZE, "init_images": [encode_file(Image.fromarray(noise))],
        "mask": encode_file(mask), "inpaint_full_res": True, "mask_blur": 0,
    }  # fmt: skip
    (asked,) = host.reads(IMG, body)
    assert asked.init_image.size == (24, 16) and (asked.width, asked.height) == (24, 16)
    answer = host.post(IMG, body)
    made = np.asarray(image_of(answer))
    assert made.shape == (60, 90, 3)
    outside = np.asarray(mask)[..., 0] == 0
    assert (made[outside] == noise[outside]).all()
    assert (made[~outside] != noise[~outside]).any()
    whole = host.post(IMG, {**body, "inpaint_full_res": False})
    assert image_of(whole).size == (24, 16)


@pytest.mark.parametrize(
    ("box", "padding", "wanted"),
    [
        ((40, 20, 52, 28), 0, (40, 20, 52, 28)),
        ((40, 20, 52, 28), 6, (31, 14, 61, 34)),
        ((0, 0, 12, 4), 0, (0, 0, 12, 8)),
        ((88, 20, 90, 40), 0, (60, 20, 90, 40)),
        ((0, 0, 90, 60), 32, (0, 0, 90, 60)),
    ],
)
def test_area_has_the_shape_of_the_size_within_the_image(box, padding, wanted):
    area = masked_area(
        Image.new("RGB", (90, 60)), area_mask((90, 60), box), padding=padding, size=(24, 16)
    )
    assert area.box == wanted


def test_absent_fields_of_a_mask_have_the_defaults_of_a1111(host):
    image, mask = spot()
    body = {"prompt": "a", **SIZE, "init_images": [encode_file(image)], "mask": encode_file(mask)}
    told = {"mask_blur": 4, "inpaint_full_res": True, "inpainting_fill": 0}
    absent, same, sharp = (
        host.reads(IMG, {**body, "seed": 1, **each})[0] for each in ({}, told, {"mask_blur": 0})
    )
    assert fingerprint(absent) == fingerprint(same) != fingerprint(sharp)
    assert image_of(host.post(IMG, body)).size == image.size


def test_mask_without_white_leaves_the_image_to_the_whole(host):
    blank = encode_file(Image.new("RGB", (24, 16)))
    body = {"prompt": "a", **SIZE, "init_images": [blank], "mask": blank, "inpaint_full_res": True}
    assert image_of(host.post(IMG, body)).size == (24, 16)


def test_facts_of_a_png_are_read_back(host):
    body = {"prompt": "a: b,\nc", "negative_prompt": "d", "seed": 5, "steps": 4, **SIZE}
    png = host.post(TXT, body).get_json()["images"][0]
    told = host.post("/sdapi/v1/png-info", {"image": f"data:image/png;base64,{png}"}).get_json()
    assert told["info"].startswith("a: b,\nc\nNegative prompt: d\nSteps: 4, ")
    assert told["items"]["parameters"] == told["info"]
    facts = told["parameters"]
    assert (facts["Prompt"], facts["Negative prompt"]) == ("a: b,\nc", "d")
    assert (facts["Seed"], facts["Size-1"], facts["Size-2"]) == ("5", "24", "16")
    plain = encode_file(Image.new("RGB", (9, 9)))
    assert host.post("/sdapi/v1/png-info", {"image": plain}).get_json() == {
        "info": "", "items": {}, "parameters": {},
    }  # fmt: skip
    for wrong in ({"image": "?"}, {}, {"image": 5}):
        answer = host.post("/sdapi/v1/png-info", wrong)
        assert answer.status_code == 400 and message_of(answer).startswith("image")
    assert host.post("/sdapi/v1/png-info", {"image": plain, "other": 1}).status_code == 400


def test_lists_name_what_a_request_may_use(host):
    modes = host.client.get("/sdapi/v1/latent-upscale-modes").get_json()
    upscalers = host.client.get("/sdapi/v1/upscalers").get_json()
    for name in [each["name"] for each in (*modes, *upscalers)]:
        assert passes(host, hr_upscaler=name)[1].width == 48, name
    memory = host.client.get("/sdapi/v1/memory").get_json()
    assert 0 < memory["ram"]["used"] <= memory["ram"]["total"]


def test_empty_prompts_are_generated(host):
    for body in ({"prompt": ""}, {}):
        assert host.reads(TXT, body)[0].prompt == " "
    assert host.reads(TXT, {"prompt": "", "enable_hr": True, **SIZE})[1].prompt == " "


def spot(size=(48, 32), box=(16, 8, 32, 24)):
    """(image, mask): red left and blue right of a green box, which the mask covers."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    image.paste("lime", box)
    return image, area_mask(size, box)


@pytest.mark.parametrize("full_res", [False, True])
@pytest.mark.parametrize("fill", [0, "0", 0.0])
def test_masked_parts_start_from_their_surroundings_where_that_is_asked(host, fill, full_res):
    image, mask = spot()
    body = {"prompt": "a", "width": 48, "height": 32, "init_images": [encode_file(image)],
            "mask": encode_file(mask), "inpaint_full_res": full_res, "mask_blur": 0}  # fmt: skip
    body |= {"inpaint_full_res_padding": 8}
    (plain,), (found,) = (
        host.reads(IMG, {**body, "inpainting_fill": each}) for each in ("1", fill)
    )
    inside = np.asarray(found.mask_image)[..., 0] > 0
    before, now = np.asarray(plain.init_image), np.asarray(found.init_image)
    assert (now[~inside] == before[~inside]).all()
    assert (before[inside][:, 1] > 128).mean() > 0.9 and now[inside][:, 1].max() < 64
    rows, columns = np.nonzero(inside)
    middle = (columns.min() + columns.max()) / 2
    left, right = (
        now[rows[columns < middle - 4], columns[columns < middle - 4]],
        now[rows[columns > middle + 4], columns[columns > middle + 4]],
    )
    assert left[:, 0].mean() > left[:, 2].mean() and right[:, 2].mean() > right[:, 0].mean()
    (absent,) = host.reads(IMG, body)
    assert (np.asarray(absent.init_image) == now).all()


@pytest.mark.parametrize("fill", [2, "3", 3])
def test_masked_content_of_latents_is_refused(host, fill):
    image, mask = map(encode_file, spot())
    body = {"prompt": "a", "init_images": [image], "mask": mask, "inpainting_fill": fill}
    answer = host.post(IMG, body)
    assert answer.status_code == 422
    assert f"inpainting_fill={fill!r} is not available: masked parts start from their " in (
        message_of(answer)
    )
    assert host.post(IMG, {**body, "strict": False}).status_code == 200


def test_nothing_but_the_mask_is_filled_without_a_seam():
    image, mask = spot((64, 48), (20, 10, 50, 40))
    grey = filled(Image.new("RGB", image.size, (90, 120, 30)), mask)
    # transparent colours are rounded to 8 bits
    assert np.abs(np.asarray(grey).astype(int) - (90, 120, 30)).max() <= 8
