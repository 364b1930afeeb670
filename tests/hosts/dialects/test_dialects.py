"""The OpenAI and A1111 dialects on a real host, with OpenAI's own client and the published one of
the other.
"""

import base64
import io
import json
import threading

import numpy as np
import openai
import pytest
import requests
import webuiapi
from PIL import Image, ImageOps

from tests.backends.features import half_mask
from tests.checkpoints import checkpoint, sample_image
from tests.hosts.client import decode
from tests.hosts.harness import wait_until
from tests.hosts.inprocess import InProcessHost


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    (folder / "style.safetensors").write_bytes(b"")
    with InProcessHost(
        type="sdxl", checkpoint=str(checkpoint("sdxl")), lora_dir=str(folder)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def video_host():
    with InProcessHost(type="svd", checkpoint=str(checkpoint("svd"))) as running:
        yield running


def client_of(host):
    return openai.OpenAI(base_url=host.url("/v1"), api_key="anything", max_retries=0)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def generated(host, **fields):
    return np.asarray(
        decode(
            host.generate_image(
                {"positive": "a red car", "steps": 3, "seed": 5, "cfg": 5.0, **fields}
            )["output"]
        )
    )


def test_openai_client_draws_what_generate_draws(host):
    client = client_of(host)
    assert [model.id for model in client.models.list()] == ["sdxl"]
    extra = {"seed": 5, "steps": 3, "guidance": 5.0}
    answer = client.images.generate(
        prompt="a red car", n=2, size="64x64", response_format="b64_json", extra_body=extra
    )
    assert len(answer.data) == 2
    for index, image in enumerate(answer.data):
        assert (pixels(base64.b64decode(image.b64_json)) == generated(host, seed=5 + index)).all()
    linked = client.images.generate(
        prompt="a red car", model="sdxl", size="64x64", extra_body=extra
    )
    assert (pixels(requests.get(linked.data[0].url, timeout=20).content) == generated(host)).all()


def test_openai_client_changes_a_image(host):
    buffer = io.BytesIO()
    sample_image(64).save(buffer, format="PNG")
    answers = [
        client_of(host).images.edit(
            image=("a.png", buffer.getvalue(), "image/png"),
            prompt="a red car",
            response_format="b64_json",
            extra_body={"seed": "5", "steps": "4", "strength": strength},
        )
        for strength in ("0", "0.5", "1")
    ]
    same, near, far = (
        pixels(base64.b64decode(answer.data[0].b64_json)).astype(int) for answer in answers
    )
    assert same.shape == (64, 64, 3)
    assert 1 < np.abs(near - same).mean() < np.abs(far - same).mean()


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"size": "big"}, openai.BadRequestError, "size='big' is not allowed"),
        ({"n": 11}, openai.BadRequestError, "n=11 is not allowed"),
        ({"background": "transparent"}, openai.UnprocessableEntityError, "background="),
        ({"extra_body": {"seeed": 1}}, openai.BadRequestError, "The nearest one is seed"),
        ({"output_format": "tiff"}, openai.BadRequestError, "output_format='tiff' is not allowed"),
        ({"extra_body": {"steps": 0}}, openai.BadRequestError, "steps=0 is not allowed"),
    ],
)
def test_openai_client_gets_its_own_errors(host, fields, kind, message):
    with pytest.raises(kind) as caught:
        client_of(host).images.generate(**{"prompt": "a", **fields})
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    (name,) = fields.get("extra_body", fields)
    assert caught.value.param == name


@pytest.mark.parametrize("num_partial", [0, 2])
def test_openai_client_sees_images_on_their_way(host, num_partial):
    client, extra = client_of(host), {"seed": 5, "steps": 30, "guidance": 5.0}
    wanted = generated(host, steps=30)
    events = list(
        client.images.generate(
            prompt="a red car", stream=True, partial_images=num_partial, extra_body=extra
        )
    )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed" and len(events) <= num_partial + 1
    assert (len(events) > 1) == (num_partial > 0)
    assert (pixels(base64.b64decode(events[-1].b64_json)) == wanted).all()
    for index, event in enumerate(events[:-1]):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == index
        assert pixels(base64.b64decode(event.b64_json)).shape == (64, 64, 3)


def test_openai_client_sees_edits_on_their_way_and_errors_of_streams(host):
    image = ("a.png", png(sample_image(64)), "image/png")
    extra = {"seed": "5", "steps": "30"}
    asked = {"image": image, "prompt": "a", "extra_body": extra, "stream": True}
    events = list(client_of(host).images.edit(**asked, partial_images=1))
    assert events[-1].type == "image_edit.completed" and events[-1].usage.total_tokens == 0
    assert {event.type for event in events[:-1]} == {"image_edit.partial_image"}
    failing = {**asked, "extra_body": {**extra, "scheduler": "unheard_of"}}
    with pytest.raises(openai.APIError, match="unheard_of"):
        list(client_of(host).images.edit(**failing))


def test_openai_client_varies_an_image_without_a_prompt(host):
    buffer = io.BytesIO()
    sample_image(64).save(buffer, format="PNG")
    extra = {"seed": 5, "steps": 3, "guidance": 5.0}
    made = client_of(host).images.create_variation(
        image=buffer.getvalue(), size="64x64", response_format="b64_json", extra_body=extra
    )
    edited = client_of(host).images.edit(
        image=buffer.getvalue(), prompt=" ", size="64x64", response_format="b64_json",
        extra_body=extra,
    )  # fmt: skip
    want = pixels(base64.b64decode(edited.data[0].b64_json))
    assert (pixels(base64.b64decode(made.data[0].b64_json)) == want).all()


def test_openai_client_changes_what_the_mask_leaves_open(host):
    extra = {"seed": "5", "steps": "4", "guidance": "5"}
    start, white = base64.b64encode(png(sample_image(64))).decode(), half_mask(64, 64)
    wanted = generated(
        host, steps=4, init_image=start, mask_image=base64.b64encode(png(white)).decode()
    )
    see_through = Image.merge(
        "RGBA", [*Image.new("RGB", (64, 64), "red").split(), ImageOps.invert(white)]
    )
    for mask in (see_through, white):  # an image without alpha is a mask as others use it
        files = {
            "image": ("a.png", png(sample_image(64)), "image/png"),
            "mask": ("m.png", png(mask), "image/png"),
        }
        answer = client_of(host).images.edit(
            **files, prompt="a red car", response_format="b64_json", extra_body=extra
        )
        assert (pixels(base64.b64decode(answer.data[0].b64_json)) == wanted).all()


def test_a1111_changes_what_the_mask_leaves_open(host):
    start, white = (
        base64.b64encode(png(image)).decode() for image in (sample_image(64), half_mask(64, 64))
    )
    black = base64.b64encode(png(ImageOps.invert(half_mask(64, 64)))).decode()
    body = {
        "prompt": "a red car",
        "seed": 5,
        "steps": 4,
        "cfg_scale": 5.0,
        "init_images": [start],
        "denoising_strength": 0.8,
        "mask_blur": 0,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
    }
    wanted = generated(host, steps=4, init_image=start, mask_image=white, strength=0.8)
    for mask in ({"mask": white}, {"mask": black, "inpainting_mask_invert": 1}):
        made = a1111(host, "img2img", {**body, **mask}).json()["images"][0]
        assert (pixels(base64.b64decode(made)) == wanted).all()
    refused = a1111(host, "img2img", {**body, "mask": "nonsense", "inpainting_mask_invert": 1})
    assert refused.status_code == 400 and refused.json()["detail"].startswith("mask: ")


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_openai_missing_images_and_broken_masks_are_refused(host):
    answer = requests.post(
        host.url("/v1/images/edits"), data={"prompt": "a"}, files={"mask": b"x"}, timeout=20
    )
    assert answer.status_code == 400 and "image is missing" in answer.json()["error"]["message"]
    answer = requests.post(
        host.url("/v1/images/edits"),
        files={"image": png(sample_image(64)), "mask": b"x"},
        timeout=20,
    )
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("mask: ")


def test_openai_client_makes_a_video_as_a_job(video_host):
    client = client_of(video_host)
    buffer = io.BytesIO()
    sample_image(64).save(buffer, format="PNG")
    video = client.videos.create(
        prompt="",
        input_reference=("a.png", buffer.getvalue(), "image/png"),
        extra_body={"num_frames": "2", "num_inference_steps": "2"},
    )
    wait_until(
        lambda: client.videos.retrieve(video.id).status == "completed",
        within_s=60,
        what="the video is done",
    )
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    with pytest.raises(openai.UnprocessableEntityError, match="generates videos"):
        client.images.generate(prompt="a")


def a1111(host, path, body=None):
    call = requests.get if body is None else requests.post
    return call(
        host.url(f"/sdapi/v1/{path}"), timeout=60, **({} if body is None else {"json": body})
    )


def test_a1111_draws_what_generate_draws(host):
    body = {
        "prompt": "a red car",
        "steps": 3,
        "seed": 5,
        "cfg_scale": 5.0,
        "width": 64,
        "height": 64,
        "n_iter": 2,
    }
    answer = a1111(host, "txt2img", {**body, "sampler_name": "DPM++ 2M Karras"}).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6] and info["scheduler"] == "DPMSolverMultistepScheduler"
    scheduler = {"scheduler": "dpmpp_2m", "use_karras_sigmas": True}
    for index, image in enumerate(answer["images"]):
        assert (
            pixels(base64.b64decode(image)) == generated(host, seed=5 + index, scheduler=scheduler)
        ).all()


def test_published_a1111_client_draws_changes_and_asks_what_there_is(host):
    client = webuiapi.WebUIApi(host="127.0.0.1", port=host.port)
    drawn = client.txt2img(
        prompt="a red car",
        steps=3,
        seed=5,
        cfg_scale=5.0,
        width=64,
        height=64,
        sampler_name="DPM++ 2M Karras",
    )
    want = generated(host, scheduler={"scheduler": "dpmpp_2m", "use_karras_sigmas": True})
    assert drawn.info["seed"] == 5 and (np.asarray(drawn.image.convert("RGB")) == want).all()
    kept, changed = (
        client.img2img(
            images=[drawn.image],
            prompt="a",
            seed=1,
            steps=4,
            denoising_strength=strength,
            width=64,
            height=64,
        ).image
        for strength in (0.01, 0.9)
    )
    distance = [
        np.abs(np.asarray(image.convert("RGB")).astype(int) - want).mean()
        for image in (kept, changed)
    ]
    assert distance[0] < distance[1]
    assert client.util_get_current_model() == "sdxl" == client.util_get_model_names()[0]
    assert "DPM++ 2M" in [sampler["name"] for sampler in client.get_samplers()]
    assert client.get_schedulers()[0]["label"] == "Automatic"
    assert [each["name"] for each in client.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert client.get_loras()[0]["name"] == "style" and client.get_progress()["progress"] == 0
    assert client.interrupt() == {}


def test_a1111_changes_a_image(host):
    buffer = io.BytesIO()
    sample_image(64).save(buffer, format="PNG")
    start = base64.b64encode(buffer.getvalue()).decode()
    made = [
        a1111(
            host,
            "img2img",
            {
                "prompt": "a",
                "seed": 1,
                "steps": 4,
                "init_images": [start],
                "denoising_strength": strength,
            },
        ).json()["images"][0]
        for strength in (0, 0.6)
    ]
    assert (
        np.abs(
            pixels(base64.b64decode(made[0])).astype(int) - pixels(base64.b64decode(made[1]))
        ).mean()
        > 1
    )
    assert (
        "init_images must hold one image"
        in a1111(host, "img2img", {"prompt": "a"}).json()["detail"]
    )


def test_second_pass_of_hires_fix_is_image_to_image_from_the_first(host):
    """Both upscalers, and by the published client."""
    fields = {"prompt": "a red car", "steps": 4, "seed": 5, "cfg_scale": 5.0, "width": 64,
              "height": 64, "sampler_name": "DPM++ 2M"}  # fmt: skip
    client = webuiapi.WebUIApi(host="127.0.0.1", port=host.port)
    larger = client.txt2img(
        **fields, enable_hr=True, hr_scale=1.5, hr_upscaler="Lanczos", denoising_strength=0.5
    )
    first = Image.fromarray(generated(host, steps=4, scheduler={"scheduler": "dpmpp_2m"}))
    buffer = io.BytesIO()
    first.resize((96, 96), Image.Resampling.LANCZOS).save(buffer, format="PNG")
    start = base64.b64encode(buffer.getvalue()).decode()
    body = {**fields, "width": 96, "height": 96, "init_images": [start], "denoising_strength": 0.5}
    by_hand = a1111(host, "img2img", body).json()["images"][0]
    assert (np.asarray(larger.image.convert("RGB")) == pixels(base64.b64decode(by_hand))).all()
    latent = a1111(host, "txt2img", {**fields, "enable_hr": True, "hr_scale": 1.5}).json()
    assert pixels(base64.b64decode(latent["images"][0])).shape == (96, 96, 3)


def test_a1111_progress_and_interrupt_reach_the_running_job(host):
    answers = []
    job = threading.Thread(
        target=lambda: answers.append(a1111(host, "txt2img", {"prompt": "a", "steps": 900}))
    )
    job.start()
    wait_until(
        lambda: a1111(host, "progress").json()["current_image"], within_s=30, what="a preview"
    )
    now = a1111(host, "progress").json()
    assert (
        0 < now["progress"] < 1
        and now["state"]["sampling_steps"] == 900
        and now["eta_relative"] > 0
    )
    assert pixels(base64.b64decode(now["current_image"])).shape == (8, 8, 3)
    assert requests.post(host.url("/sdapi/v1/interrupt"), timeout=20).status_code == 200
    job.join(timeout=30)
    assert answers[0].status_code == 200, answers[0].text
    (image,) = answers[0].json()["images"]
    assert pixels(base64.b64decode(image)).std() > 0
    assert a1111(host, "progress").json()["progress"] == 0


@pytest.mark.parametrize(("name", "number"), [("interrupt", 1), ("skip", 2)])
def test_a1111_interrupt_answers_with_the_images_so_far_and_skip_goes_on(host, name, number):
    fields = {"prompt": "a", "seed": 5, "sampler_name": "Euler", "width": 64, "height": 64}
    answers = []
    job = threading.Thread(
        target=lambda: answers.append(a1111(host, "txt2img", {**fields, "steps": 60, "n_iter": 2}))
    )
    job.start()
    wait_until(
        lambda: a1111(host, "progress").json()["state"]["sampling_step"] > 3,
        within_s=60,
        what="the first image is begun",
    )
    assert requests.post(host.url(f"/sdapi/v1/{name}"), timeout=20).status_code == 200
    job.join(timeout=120)
    images = [pixels(base64.b64decode(one)).astype(int) for one in answers[0].json()["images"]]
    assert len(images) == number == len(json.loads(answers[0].json()["info"])["all_seeds"])
    assert images[0].shape == (64, 64, 3)
    again = a1111(host, "txt2img", {**fields, "steps": 60, "seed": 5}).json()["images"][0]
    assert (pixels(base64.b64decode(again)) != images[0]).any(), "it did not end early"


def test_a1111_lists_tell_what_is_there(host):
    assert a1111(host, "sd-models").json()[0]["title"] == "sdxl"
    assert {"name": "Euler a", "aliases": ["euler_a", "k_euler_a"], "options": {}} in a1111(
        host, "samplers"
    ).json()
    assert [lora["name"] for lora in a1111(host, "loras").json()] == ["style"]
    assert a1111(host, "options").json()["sd_model_checkpoint"] == "sdxl"
    assert a1111(host, "options", {"sd_model_checkpoint": "sdxl"}).status_code == 200
    assert (
        "is not loaded" in a1111(host, "options", {"sd_model_checkpoint": "other"}).json()["detail"]
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN"}, "hr_upscaler='R-ESRGAN' is not"),
        ({"restore_faces": True}, "restore_faces=True is not available"),
        ({"sampler_name": "Magic"}, "sampler_name='Magic'"),
        ({"n_iter": 99}, "n_iter x batch_size is 99"),
        ({"batch_size": "x"}, "batch_size='x' is not allowed"),
    ],
)
def test_a1111_refuses_in_its_own_shape(host, body, message):
    answer = a1111(host, "txt2img", {"prompt": "a", **body})
    assert answer.status_code in (400, 422) and message in answer.json()["detail"]


def test_pages_of_other_sites_are_refused(host):
    for path in ("/generate", "/v1/jobs", "/v1/images/generations", "/sdapi/v1/interrupt"):
        answer = requests.post(
            host.url(path),
            json={"prompt": "a"},
            headers={"Origin": "http://evil.example"},
            timeout=20,
        )
        assert answer.status_code == 403, path
    own = {"Origin": host.url("")}
    assert (
        requests.post(
            host.url("/generate"), json={"prompt": "a", "steps": 1}, headers=own, timeout=30
        ).status_code
        == 200
    )
