"""Adapters over HTTP: a host with a LoRA, a ControlNet and an IP-Adapter, asked as clients ask."""

import shutil

import numpy as np
import pytest

from tests.checkpoints import (
    IP_ADAPTER_FILE,
    checkpoint,
    controlnet,
    ip_adapter,
    lora,
    sample_image,
)
from tests.hosts.client import assert_is_error, decode, encode
from tests.hosts.inprocess import InProcessHost


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    shutil.copy(lora("sd1", seed=1), folder / "other.v2.safetensors")
    options = {
        "lora": {str(lora("sd1")): 0.8},
        "lora_dir": str(folder),
        "control_net": str(controlnet("sd1")),
        "ip_adapter": {str(ip_adapter("sd1") / IP_ADAPTER_FILE): 0.6},
        "quantize_encoder_to": "int8",
        "prewarm_steps": 1,
    }
    with InProcessHost(type="sd1", checkpoint=str(checkpoint("sd1")), **options) as running:
        yield running


def body(**fields):
    hint = encode(sample_image(48))
    return {
        "prompt": "a red car",
        "num_inference_steps": 2,
        "seed": 3,
        "control_image": hint,
        "ip_image": hint,
        **fields,
    }


def pixels(host, **fields):
    return np.asarray(decode(host.generate_image(body(**fields))["output"])).astype(int)


def test_each_adapter_follows_the_request_and_leaves_nothing_for_the_next(host):
    plain = pixels(host)
    changes = [
        {"lora": {"other.v2.safetensors": 0.9}},
        {"lora": {}},
        {"control_image": encode(sample_image(48, seed=1))},
        {"controlnet_scale": 0.1},
        {"control_guidance_end": 0.5},
        {"ip_image": encode(sample_image(48, seed=1))},
        {"ip_image": [encode(sample_image(48)), encode(sample_image(48, seed=1))]},
        {"ip_adapter_scale": 0.1},
    ]
    for change in changes:
        assert np.abs(pixels(host, **change) - plain).max() > 2, change
    assert (pixels(host) == plain).all()


def test_settings_tell_what_quantising_saved(host):
    pixels(host)
    facts = host._session.get(host.url("/settings"), timeout=10).json()
    assert facts["last_report"]["bytes_saved"]["text_encoder"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control_image": None}, "control_image is missing, but a ControlNet is loaded"),
        ({"ip_image": None}, "ip_adapter_image is missing, but an IP-Adapter is loaded"),
        ({"lora": {"../other.safetensors": 1.0}}, "is not a file that requests may use"),
        ({"lora": "other.v2.safetensors"}, "lora must be an object"),
        ({"ip_adapter_scale": 99}, "ip_adapter_scale=99 is not allowed"),
        ({"control_image": "garbage!"}, "control_image: "),
    ],
)
def test_what_does_not_fit_is_refused(host, change, message):
    answer = host.post({**body(), **change})
    assert answer.status_code == 400
    assert message in assert_is_error(answer.json())


def test_settings_tell_how_many_steps_the_cache_skipped():
    with InProcessHost(
        type="pixa", checkpoint=str(checkpoint("pixa")), step_cache="first_block,10"
    ) as host:
        assert (
            host.generate_image({"prompt": "a red car", "num_inference_steps": 3, "seed": 3})[
                "message"
            ]
            == "OK"
        )
        facts = host._session.get(host.url("/settings"), timeout=10).json()
        assert facts["last_report"]["step_cache"] == {"calls": 3, "skipped": 2}
