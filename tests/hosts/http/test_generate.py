"""/generate of all model types over a real socket, with the bodies of the existing clients, read as
they read them.
"""

import itertools
import json
import threading
import time

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from hosts.http import media
from tests.checkpoints import NAMES, checkpoint, sample_image
from tests.hosts import bodies
from tests.hosts.client import assert_is_error, decode, encode
from tests.hosts.inprocess import InProcessHost

WITH_LATENTS = {*bodies.IMAGE_TYPES, "flux_kontext"}
LATE = (
    "flux_kontext",
    "qwenimage",
    "flux2",
    "sd2",
    "pixs",
    "zimage",
)  # in the long tail: others here get the same bodies
VIDEOS = {"ad", "svd", "wan_t2v"}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generated")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in LATE else name for name in NAMES],
)
def host(request, image_folder):
    """One host at a time; pytest orders the tests so that each model is loaded once."""
    with InProcessHost(
        type=request.param, checkpoint=str(checkpoint(request.param)), image_dirs=str(image_folder)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def sdxl():
    with InProcessHost(type="sdxl", checkpoint=str(checkpoint("sdxl"))) as running:
        yield running


def small_body(host, **fields):
    """A short text-to-image (or image-to-whatever) request of this type."""
    body = {"positive": "a red car", "steps": 2, "seed": 3, "frames": 2, **fields}
    return (
        {**body, "image": bodies.image(16 if host.spec.upscale > 1 else 64)}
        if "image" in host.spec.requires
        else body
    )


def pixels(body):
    """The image, or the frames one below the other."""
    output = decode(body["output"])
    return (
        np.concatenate([np.asarray(frame) for frame in output])
        if isinstance(output, list)
        else np.asarray(output)
    )


def test_golden_bodies_are_answered_with_the_keys_of_their_type(host, image_folder):
    name = host.spec.name
    for sender, make in bodies.bodies(name, image_folder).items():
        sent = make()
        body = host.generate_image(sent)
        keys = {"message", "output", "is_image"} | ({"latent"} if name in WITH_LATENTS else set())
        assert set(body) == keys, sender
        assert (body["message"], body["is_image"]) == ("OK", name not in VIDEOS), sender
        output = decode(body["output"])
        frames = output if name in VIDEOS else [output]
        assert [(type(frame), frame.mode, frame.size) for frame in frames] == [
            (Image.Image, "RGB", (64, 64))
        ] * len(frames), sender
        assert len(frames) == (sent.get("frames", 16) if name in VIDEOS else 1), sender
        assert max(np.asarray(frame).std() for frame in frames) > 1, f"{sender}: a blank image"


def gives_no_latent(host):
    """Whether the type has none to give. Then its answer must not have the field either."""
    if host.spec.name in WITH_LATENTS:
        return False
    assert "latent" not in host.generate_image(small_body(host))
    return True


def test_latent_is_what_comfyui_puts_into_its_graph(host):
    if gives_no_latent(host):
        return
    latent = decode(host.generate_image(small_body(host))["latent"])
    channels = 16 if host.spec.name in ("sd3", "flux", "flux_kontext", "zimage", "qwenimage") else 4
    assert type(latent) is torch.Tensor
    assert (latent.dtype, latent.device.type, tuple(latent.shape)) == (
        torch.float32,
        "cpu",
        (1, channels, 8, 8),
    )
    assert latent.is_contiguous() and not latent.requires_grad and torch.isfinite(latent).all()


def test_same_seed_makes_the_same_image_and_minus_one_another_each_time(host):
    first, again = (pixels(host.generate_image(small_body(host, seed=11))) for _ in range(2))
    assert (first == again).all()
    drawn = [pixels(host.generate_image(small_body(host, seed=-1))) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any() and (drawn[0] != first).any()


def test_prompt_or_image_decides_what_is_drawn(host):
    name = host.spec.name
    other = (
        {"image": encode(sample_image(16 if name == "sdup" else 64, seed=5))}
        if name == "svd"
        else {"positive": "blue sky"}
    )
    assert (
        pixels(host.generate_image(small_body(host)))
        != pixels(host.generate_image({**small_body(host), **other}))
    ).any()


def test_latent_with_denoise_zero_gives_the_same_image_back(host):
    if gives_no_latent(host):
        return
    first = host.generate_image(small_body(host))
    again = host.generate_image(small_body(host, latent=first["latent"], denoise=0))
    assert (pixels(first) == pixels(again)).all()
    assert torch.equal(decode(first["latent"]), decode(again["latent"]))


def test_latent_decoded_by_the_clients_own_vae_is_the_output(host):
    if gives_no_latent(host):
        return
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    body = host.generate_image(small_body(host))
    is_video = host.spec.name == "qwenimage"  # its VAE takes an image as a video of one frame
    vae = (AutoencoderKLQwenImage if is_video else AutoencoderKL).from_pretrained(
        checkpoint(host.spec.name) / "vae"
    )
    latent = decode(body["latent"])
    with torch.no_grad():  # ComfyUI: latents in unscaled VAE space, straight into the decoder
        decoded = (
            vae.decode(latent[:, :, None]).sample[:, :, 0]
            if is_video
            else vae.decode(latent).sample
        )
    image_of_client = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(image_of_client - pixels(body).astype(int)).max() <= 1


def test_denoising_end_stops_early(host):
    if gives_no_latent(host):
        return
    whole, part = (
        decode(host.generate_image(small_body(host, steps=4, denoising_end=end))["latent"])
        for end in (1.0, 0.3)
    )
    assert not torch.equal(whole, part)


def test_host_goes_on_after_every_kind_of_refusal(host):
    good = pixels(host.generate_image(small_body(host)))
    refused = [
        ({"steps": 0}, 400, "steps=0"),
        ({"cfg": -1}, 400, "cfg=-1"),
        ({"denoise": 7}, 400, "denoise=7"),
        ({"scheduler": "nonsense"}, 400, "is not a scheduler"),
        ({"sigmas": [1.0, 2.0, 0.0]}, 400, "sigmas must decrease"),
        ({"sigmas": [3.0, 1.0, 0.0], "timesteps": [5, 1]}, 400, "Send one of them"),
    ]
    if "prompt" in host.spec.requires:
        refused.append(({"positive": ""}, 400, "no prompt was given"))
    if "image" in host.spec.requires:
        refused += [
            ({"image": None}, 400, "image is missing"),
            ({"image": "garbage!"}, 400, "image: "),
            ({"image": "/etc/passwd"}, 400, "image: "),
        ]
    if host.spec.name in WITH_LATENTS:
        refused += [
            ({"latent": "AAAA"}, 400, "latent: "),
            (
                {"latent": encode(torch.zeros(1, 3, 8, 8)), "denoise": 0.5},
                400,
                "latent has shape (1, 3, 8, 8)",
            ),
            (
                {"latent": encode(torch.zeros(4, 8, 8)), "denoise": 0.5},
                400,
                "latent has shape (4, 8, 8)",
            ),
        ]
    for change, status, message in refused:
        answer = host.post({**small_body(host), **change})
        assert message in assert_is_error(answer.json()), change
        assert answer.status_code == status, change
    assert (pixels(host.generate_image(small_body(host))) == good).all()


def test_clip_skip_beyond_the_text_encoder_is_refused_or_dropped(host):
    answer = host.post(small_body(host, clip_skip=12))
    if "clip_skip" in host.parameters:
        assert answer.status_code == 400
        assert "clip_skip=12 is not allowed" in assert_is_error(answer.json())
        assert (
            pixels(host.generate_image(small_body(host, clip_skip=1)))
            != pixels(host.generate_image(small_body(host)))
        ).any()
    else:
        assert answer.status_code == 200


def test_embeds_of_another_model_are_refused_before_any_rank_sees_them(sdxl):
    conditioning = encode([[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 1280)}]])
    answer = sdxl.post({"positive_embeds": conditioning, "steps": 2})
    assert answer.status_code == 400
    assert "positive_embeds" in assert_is_error(answer.json())
    without_pooled = encode([[torch.zeros(1, 77, 64), {}]])
    answer = sdxl.post({"positive_embeds": without_pooled, "steps": 2})
    assert "positive_embeds has no pooled_output" in assert_is_error(answer.json())


def test_what_no_rank_could_do_is_refused_instead_of_queued(sdxl):
    arrays = {
        "latents": np.zeros((1, 16, 8, 8), np.float32),
        "prompt_embeds": np.zeros((1, 77, 768), np.float32),
        "pooled_prompt_embeds": np.zeros((1, 1280), np.float32),
    }
    sent = {name: media.npy(array) for name, array in arrays.items()}
    latents, embeds = {"latents": sent.pop("latents")}, sent
    right = media.npy(np.zeros((1, 4, 8, 8), np.float32))
    for fields, said in (
        ({**latents, "prompt": "a"}, "latents has shape (1, 16, 8, 8)"),
        (embeds, "prompt_embeds has a width of 768"),
        ({"prompt": "a", "denoising_end": 0}, "no step is left of 30 steps with denoising_end=0"),
        ({"prompt": "a", "latents": right, "width": 128}, "width=128 contradicts latents"),
    ):
        answer = requests.post(sdxl.url("/v1/jobs"), json=fields, timeout=60)
        assert (answer.status_code, said in answer.text) == (400, True), answer.text


def test_a_client_is_told_that_its_prompt_was_cut(sdxl):
    body = {"prompt": "a cat " * 100, "seed": 1}
    said = "tokens of the prompt were not read"

    def post(path, **headers):
        return requests.post(sdxl.url(path), json=body, headers=headers, timeout=60)

    job = post("/v1/jobs").json()
    requests.get(sdxl.url(f"/v1/jobs/{job['id']}/events"), timeout=60)  # ends with the job
    assert said in requests.get(sdxl.url(f"/v1/jobs/{job['id']}"), timeout=60).json()["notes"][0]
    result = requests.get(sdxl.url(f"/v1/jobs/{job['id']}/result"), timeout=60)
    assert said in result.headers["X-Notes"]
    assert said in post("/generate", Accept="image/png").headers["X-Notes"]
    assert said in post("/generate").headers["X-Notes"]
    assert said in post("/v1/images/generations").headers["X-Notes"]
    assert not json.loads(post("/sdapi/v1/txt2img").json()["info"])["notes"], "A1111 reads all"
    body["prompt"] = "a cat"
    assert "X-Notes" not in post("/generate", Accept="image/png").headers


def test_embeds_and_text_together_are_refused(sdxl):
    answer = sdxl.post(
        {"positive_embeds": bodies.conditioning("sdxl", 0), "positive": "a", "steps": 2}
    )
    assert (answer.status_code, "Send one of them" in assert_is_error(answer.json())) == (400, True)


def test_negative_embeds_change_the_image(sdxl):
    body = {"positive_embeds": bodies.conditioning("sdxl", 0), "steps": 2, "seed": 1, "cfg": 7.0}
    without, with_negative = (
        pixels(sdxl.generate_image({**body, **extra}))
        for extra in ({}, {"negative_embeds": bodies.conditioning("sdxl", 1)})
    )
    assert (without != with_negative).any()


def test_negative_text_changes_the_image(sdxl):
    body = {"positive": "a cat", "steps": 2, "seed": 1, "cfg": 7.0}
    assert (
        pixels(sdxl.generate_image(body))
        != pixels(sdxl.generate_image({**body, "negative": "big red house"}))
    ).any()


def test_denoise_decides_how_much_of_the_latent_is_left(sdxl):
    latent = decode(sdxl.generate_image({"positive": "a cat", "steps": 4, "seed": 1})["latent"])
    distance = []
    for denoise in (0.25, 0.5, 1.0):
        made = decode(
            sdxl.generate_image(
                {
                    "positive": "a dog",
                    "steps": 4,
                    "seed": 2,
                    "latent": encode(latent),
                    "denoise": denoise,
                }
            )["latent"]
        )
        distance.append(float((made - latent).norm()))
    assert 0 < distance[0] < distance[1] < distance[2]
    from_noise = decode(sdxl.generate_image({"positive": "a dog", "steps": 4, "seed": 2})["latent"])
    assert torch.equal(made, from_noise)  # at full strength the latent only sets the size


def test_size_comes_from_latent_then_request_then_launch(sdxl):
    def size(**fields):
        return decode(sdxl.generate_image({"positive": "a", "steps": 1, **fields})["output"]).size

    assert size() == (64, 64)
    assert size(width=48, height=32) == (48, 32)
    assert size(width=50, height=37) == (48, 32)  # cut down to multiples of eight
    assert size(width=48, height=32, latent=bodies.tensor(1, 4, 5, 6)) == (48, 40)


def test_two_posts_at_once_are_made_one_after_the_other_and_not_swapped(sdxl):
    alone = {
        seed: pixels(sdxl.generate_image({"positive": "a", "steps": 4, "seed": seed}))
        for seed in range(4)
    }
    together = {}

    def post(seed):
        answer = requests.post(
            sdxl.url("/generate"), json={"positive": "a", "steps": 4, "seed": seed}, timeout=60
        )
        together[seed] = pixels(answer.json())

    threads = [threading.Thread(target=post, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all((together[seed] == alone[seed]).all() for seed in alone)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_progress_never_falls_within_a_job_and_ends_at_a_hundred(scheduler, sdxl):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(
            sdxl.post({"positive": "a", "steps": 12, "scheduler": scheduler})
        )
    )
    thread.start()
    seen = []
    while thread.is_alive():
        started = time.monotonic()
        seen.append(float(requests.get(sdxl.url("/progress"), timeout=5).text))
        assert time.monotonic() - started < 2
    thread.join()
    assert answers[0].status_code == 200
    running = list(
        itertools.dropwhile(lambda percent: percent == 100, seen)
    )  # the last job's, until this one starts
    assert running == sorted(running)
    assert len({percent for percent in running if 0 < percent < 100}) >= 2, seen
    assert float(requests.get(sdxl.url("/progress"), timeout=5).text) == 100


def test_progress_is_zero_after_a_failed_job(sdxl):
    late = {"scheduler": "euler", "use_karras_sigmas": True}  # where the ranks alone know the steps
    answer = sdxl.post({"positive": "a", "steps": 2, "denoising_end": 0.01, "scheduler": late})
    assert "no step is left of 2 steps" in assert_is_error(answer.json())
    assert requests.get(sdxl.url("/progress"), timeout=5).text == "0"


def test_every_answer_closes_its_connection_and_has_a_length(sdxl):
    for answer in (
        requests.get(sdxl.url("/initialize"), timeout=5),
        requests.get(sdxl.url("/progress"), timeout=5),
        requests.get(sdxl.url("/none"), timeout=5),
        sdxl.post({"positive": "a", "steps": 0}),
    ):
        assert answer.headers["Connection"] == "close"
        assert int(answer.headers["Content-Length"]) == len(answer.content)


def test_client_that_goes_away_disturbs_nobody(sdxl):
    with pytest.raises(requests.ReadTimeout):
        requests.post(sdxl.url("/generate"), json={"positive": "a", "steps": 40}, timeout=0.2)
    assert sdxl.generate_image({"positive": "a", "steps": 1})["message"] == "OK"


@pytest.mark.parametrize(
    ("accept", "first_bytes"),
    [("image/png", b"\x89PNG"), ("image/jpeg", b"\xff\xd8"), ("image/webp", b"RIFF")],
)
def test_image_can_be_had_as_a_file(accept, first_bytes, sdxl):
    body = {"positive": "a", "steps": 2, "seed": 9}
    answer = sdxl.post(body, headers={"Accept": accept})
    assert (answer.headers["Content-Type"], answer.headers["X-Seed"]) == (accept, "9")
    assert answer.content.startswith(first_bytes)


def test_local_image_path_is_read_from_the_allowed_folder_only(image_folder, tmp_path):
    for folder in (image_folder, tmp_path):
        sample_image(16).save(folder / "b64777", format="PNG")
    (image_folder / "link").symlink_to(tmp_path / "b64777")
    (image_folder / "text").write_text("not an image")
    with InProcessHost(
        type="sdup", checkpoint=str(checkpoint("sdup")), image_dirs=str(image_folder)
    ) as host:
        body = {"positive": "sharp", "steps": 1, "seed": 1}
        by_path = host.generate_image({**body, "image": str(image_folder / "b64777")})
        assert (
            pixels(by_path)
            == pixels(host.generate_image({**body, "image": encode(sample_image(16))}))
        ).all()
        for path in (
            tmp_path / "b64777",
            image_folder / "link",
            image_folder / "text",
            image_folder / "none",
            image_folder,
        ):
            answer = host.post({**body, "image": str(path)})
            assert answer.status_code == 400
            assert assert_is_error(answer.json()).startswith("image: ")
