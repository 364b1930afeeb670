"""The JSON of POST /generate -> GenerateRequest: old and new names, and a message for everything
that cannot be meant.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from backends.errors import RequestError
from backends.generation.admission import AtLaunch
from backends.model_table import read_table
from hosts.compat.fields import NAMES, Accepted, read_request
from hosts.compat.v2_fields import COUNTED, v1_fields
from hosts.http import decode
from tests.checkpoints import lora
from tests.hosts.client import encode

TABLE = read_table()
IMAGE = Image.new("RGB", (16, 8), "red")


ADAPTED = {"control_image": encode(IMAGE), "ip_image": encode(IMAGE)}
"""What every request needs where adapters are loaded."""
EVERYTHING = Accepted(
    launch=AtLaunch(control_nets=1, ip_adapters=1, compel=True), upscalers={"4x": 4}
)


def read(body, type_name="sdxl", image_dirs=(), accepted=None):
    accepted = accepted or Accepted(image_dirs=image_dirs)
    spec = TABLE[type_name]  # most bodies here have no prompt
    spec = replace(spec, requires=tuple(each for each in spec.requires if each != "prompt"))
    return read_request(body, spec=spec, accepted=accepted)


def test_old_names_become_diffusers_names():
    request = read(
        {
            "seed": 7,
            "steps": 30,
            "cfg": 7.0,
            "clip_skip": 2,
            "denoise": 0.5,
            "denoising_end": 0.9,
            "positive": "a dog",
            "negative": "fog",
        }
    )
    assert request.model_dump(exclude_unset=True) == {
        "prompt": "a dog", "negative_prompt": "fog", "seed": 7, "num_inference_steps": 30,
        "guidance_scale": 7.0, "clip_skip": 2,
        "strength": 0.5, "denoising_end": 0.9,
    }  # fmt: skip


def test_new_names_mean_the_same():
    old = read({"positive": "a", "negative": "b", "steps": 3, "cfg": 2, "denoise": 1})
    new = read(
        {
            "prompt": "a",
            "negative_prompt": "b",
            "num_inference_steps": 3,
            "guidance_scale": 2,
            "strength": 1,
        }
    )
    assert old == new


def test_denoising_start_is_another_name_for_denoise():
    assert read({"positive": "a", "denoising_start": 0.25}).strength == 0.25


def test_steps_of_a_v2_client_are_told_by_its_own_names():
    latent = encode(torch.zeros(1, 4, 8, 8))
    steps = {"steps": 4, "denoising_start": 3, "denoising_end": 2}
    body = v1_fields({"positive": "a", "latent": latent, **steps})
    with pytest.raises(RequestError, match="with denoising_start=3, denoising_end=2:") as refused:
        read_request(body, spec=TABLE["sdxl"], accepted=Accepted(), renamed=COUNTED)
    assert refused.value.field == "denoising_end"


def test_unknown_keys_are_ignored_and_null_and_empty_text_are_absent():
    assert read({"positive": "a", "negative": "", "steps": None, "future": {"x": 1}}) == read(
        {"positive": "a"}
    )


def test_what_has_no_effect_is_logged(caplog):
    with caplog.at_level("INFO"):
        read({"positive": "a", "negative": "fog", "frames": 9, "clip_skip": 0}, "flux")
    assert "without effect on FLUX.1: frames, negative" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        read({"positive": "a", "negative": "fog"})
    assert "without effect" not in caplog.text


@pytest.mark.parametrize("body", [[], "text", 5, None])
def test_body_must_be_an_object(body):
    with pytest.raises(RequestError, match="the body must be one JSON object, not"):
        read(body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positive", 5),
        ("negative", ["x"]),
        ("seed", "seven"),
        ("seed", 1.5),
        ("seed", 10**30),
        ("steps", 0),
        ("steps", 1001),
        ("steps", 2.5),
        ("steps", "many"),
        ("cfg", -1),
        ("cfg", 1e9),
        ("cfg", float("nan")),
        ("cfg", float("inf")),
        ("clip_skip", -1),
        ("clip_skip", 13),
        ("height", 4),
        ("height", 100_000),
        ("width", "wide"),
        ("denoise", 1.5),
        ("denoise", -0.1),
        ("denoise", float("nan")),
        ("denoising_end", 2),
        ("scheduler", 5),
        ("warmup_steps", -1),
        ("quality", "best"),
        ("controlnet_scale", "x"),
    ],
)
def test_field_out_of_range_is_refused_by_its_name_as_sent(field, value):
    with pytest.raises(RequestError) as caught:
        read({"positive": "a", **{field: value}} if field != "positive" else {field: value})
    assert caught.value.field == field
    message = str(caught.value)
    assert message.startswith(f"{field}=") and "is not allowed: " in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", 0),
        ("frames", 10_000),
        ("decode_chunk_size", 0),
        ("motion_bucket_id", -1),
        ("noise_aug_strength", -1),
    ],
)
def test_video_field_out_of_range_is_refused_by_its_name(field, value):
    with pytest.raises(RequestError, match=f"{field}=.* is not allowed") as caught:
        read({"image": encode(IMAGE), field: value}, "svd")
    assert caught.value.field == field


def test_every_plain_field_can_be_sent():
    """Each is read under each of its names, so a renamed field cannot be lost."""
    values = {
        "prompt": "p",
        "negative_prompt": "n",
        "scheduler": "euler",
        "quality": "exact",
        "prompt_syntax": "a1111",
        "latent_space": "model",
        "upscaler": "4x",
        "height": 8,
        "width": 8,
    }
    # the model is the host's to find, and arguments are for types without fields of their own
    plain = set(NAMES) - {*decode.IMAGES, *decode.ARRAYS, *decode.LISTS}
    for field in plain - {"lora", "model", "arguments"}:
        for name in NAMES[field]:
            value = values.get(field, 1)
            taken_by = next(
                each
                for each in ("ad", "svd", "sdxl")
                if field not in EVERYTHING.unused(TABLE[each])
            )
            beside = {"svd": {"image": encode(IMAGE)}}.get(taken_by, {})
            beside |= {"compel": False} if field == "clip_skip" else {}
            if field == "control_guidance_start":
                value = 0.5
            body = {name: value, **ADAPTED, **beside}
            assert getattr(read(body, taken_by, accepted=EVERYTHING), field) == value


def test_frames_are_ignored_where_a_image_is_made():
    assert read({"positive": "a", "frames": 16}).num_frames is None


def test_latent_is_decoded_where_it_is_used_only():
    latent = torch.randn(1, 4, 8, 8)
    assert (read({"positive": "a", "latent": encode(latent)}).latents == latent.numpy()).all()
    assert read({"positive": "a", "latent": "not even base64"}, "ad").latents is None


def test_images_for_adapters_that_are_not_loaded_are_left_alone():
    request = read(
        {"positive": "a", "ip_image": "not even base64", "control_image": 5, "image": "nothing"}
    )
    assert request == read({"positive": "a"})


def test_embeds_bring_their_pooled_part():
    conditioning = [[torch.ones(1, 5, 32), {"pooled_output": torch.ones(1, 16), "guidance": 3.0}]]
    request = read(
        {"positive_embeds": encode(conditioning), "negative_embeds": encode(conditioning)}
    )
    assert request.prompt_embeds.shape == request.negative_prompt_embeds.shape == (1, 5, 32)
    assert (
        request.pooled_prompt_embeds.shape == request.negative_pooled_prompt_embeds.shape == (1, 16)
    )


@pytest.mark.parametrize(
    "sent", [[14.6, 3.0, 0.0], [14, 3, 0], encode(torch.tensor([14.6, 3.0, 0.0]))]
)
def test_sigmas_come_as_a_list_or_as_a_tensor(sent):
    sigmas = read({"positive": "a", "sigmas": sent}).sigmas
    assert len(sigmas) == 3 and all(isinstance(sigma, float) for sigma in sigmas)


def test_timesteps_become_whole_numbers():
    assert read(
        {"positive": "a", "timesteps": encode(torch.tensor([999.0, 500.0, 1.0]))}
    ).timesteps == [999, 500, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, "x"], "sigmas must be a list of numbers or an encoded 1-D tensor"),
        ([True], "sigmas must be a list of numbers"),
        (7, "sigmas must be a list of numbers"),
        (
            encode(torch.zeros(2, 2)),
            "sigmas must be a list of numbers or a 1-D tensor, not of shape \\(2, 2\\)",
        ),
        ("garbage!", "sigmas: .*base64"),
    ],
)
def test_sigmas_of_another_kind_are_refused(value, message):
    with pytest.raises(RequestError, match=message) as caught:
        read({"positive": "a", "sigmas": value})
    assert caught.value.field == "sigmas"


@pytest.mark.parametrize("percent", [50.0, [50.0]])
def test_image_scale_of_the_oldest_clients_is_a_percentage(percent):
    assert read({"image": encode(IMAGE), "image_scale": percent}, "svd").image.size == (8, 4)


def test_image_scale_of_a_hundred_changes_nothing():
    image = read({"image": encode(IMAGE), "image_scale": 100.0}, "svd").image
    assert image.size == IMAGE.size and (np.asarray(image) == np.asarray(IMAGE)).all()


@pytest.mark.parametrize("percent", [0, -5, 5000, "big", [1, 2], True, float("nan")])
def test_image_scale_that_is_no_percentage_is_refused(percent):
    with pytest.raises(
        RequestError, match=r"image_scale=.* is not allowed. Send a percentage from 1 to 1000."
    ) as caught:
        read({"image": encode(IMAGE), "image_scale": percent}, "svd")
    assert caught.value.field == "image_scale"


def test_image_may_be_named_by_path_inside_the_allowed_folders_only(tmp_path):
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for folder in (allowed, other):
        folder.mkdir()
        IMAGE.save(folder / "b64123456", format="PNG")
    assert (
        read({"image": str(allowed / "b64123456")}, "svd", (str(allowed),)).image.size == IMAGE.size
    )
    for path in (other / "b64123456", allowed / ".." / "other" / "b64123456"):
        with pytest.raises(RequestError) as caught:
            read({"image": str(path)}, "svd", (str(allowed),))
        assert caught.value.field == "image"


def test_path_of_something_other_than_a_image_is_refused(tmp_path):
    (tmp_path / "secret").write_text("root:x:0:0")
    with pytest.raises(RequestError) as caught:
        read({"image": str(tmp_path / "secret")}, "svd", (str(tmp_path),))
    assert "root" not in str(caught.value)


def test_loras_of_a_request_come_from_the_folders_that_it_may_use_only(tmp_path):
    (tmp_path / "loras" / "sub").mkdir(parents=True)
    for name in ("loras/a.v1.safetensors", "loras/sub/b.safetensors", "secret.safetensors"):
        shutil.copy(lora("sdxl"), tmp_path / name)
    accepted = Accepted(lora_dirs=(str(tmp_path / "loras"),))

    def loras(given, accepted=accepted):
        return read_request(
            {"positive": "a", "lora": given}, spec=TABLE["sdxl"], accepted=accepted
        ).lora

    assert loras({"sub/b.safetensors": 1, str(tmp_path / "loras/a.v1.safetensors"): -0.5}) == {
        str(tmp_path / "loras/sub/b.safetensors"): 1.0,
        str(tmp_path / "loras/a.v1.safetensors"): -0.5,
    }
    assert loras({}) == {}
    for name in (
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "/etc/passwd",
        "sub",
        "no.safetensors",
    ):
        with pytest.raises(RequestError, match="is not a file that requests may use"):
            loras({name: 1.0})
    for name in ("a\0b", "\ud800", "x" * 3000, "/" * 3000, "~nobody/x", ""):
        with pytest.raises(RequestError):
            loras({name: 1.0})
    with pytest.raises(RequestError, match="scale"):
        loras({"sub/b.safetensors": 10**400})
    with pytest.raises(RequestError, match="no folder: the host was started without --lora_dir"):
        loras({"sub/b.safetensors": 1.0}, Accepted())
    for wrong in (["a"], {"sub/b.safetensors": "1"}, {"sub/b.safetensors": True}):
        with pytest.raises(RequestError, match="lora must be an object"):
            loras(wrong)
    with pytest.raises(RequestError, match="has scale nan"):
        loras({"sub/b.safetensors": float("nan")})


def test_images_for_adapters_are_decoded_only_where_one_is_loaded():
    body = {"positive": "a", "control_image": "garbage", "ip_image": "garbage"}
    asked = read_request(body, spec=TABLE["sdxl"], accepted=Accepted())
    assert (asked.control_image, asked.ip_adapter_image) == (None, None)
    for name, switch in (("control_image", "control_nets"), ("ip_image", "ip_adapters")):
        with pytest.raises(RequestError, match=name):
            read_request(
                body, spec=TABLE["sdxl"], accepted=Accepted(launch=AtLaunch(**{switch: 1}))
            )


def test_images_for_adapters_may_be_several_and_scaled_and_in_the_oldest_place():
    one, other = encode(Image.new("RGB", (40, 40))), encode(Image.new("RGB", (20, 20)))
    accepted = Accepted(launch=AtLaunch(control_nets=2, ip_adapters=1), image_scale=50.0)
    body = {
        "positive": "a",
        "control_image": [one, other],
        "control_image_scale": 100.0,
        "image": one,
    }
    asked = read_request(body, spec=TABLE["sdxl"], accepted=accepted)
    assert [image.size for image in asked.control_image] == [(40, 40), (20, 20)]
    assert asked.ip_adapter_image.size == (20, 20)
