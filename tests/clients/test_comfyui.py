"""The ComfyUI nodes in as much of ComfyUI as they meet, on real hosts."""

import json
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from tests.backends.features import half_mask
from tests.checkpoints import checkpoint, sample_image
from tests.clients.comfyui import FOLDER, ComfyUI, InterruptProcessingException
from tests.hosts.client import decode, encode
from tests.hosts.harness import REPOSITORY, assert_port_is_free, free_port, wait_until
from tests.hosts.inprocess import InProcessHost

INPUTS = {
    "prompt": "a red car",
    "negative_prompt": "blurry",
    "seed": 5,
    "steps": 4,
    "guidance": 6.0,
}
BODY = {"positive": "a red car", "negative": "blurry", "seed": 5, "steps": 4, "cfg": 6.0}


@pytest.fixture(scope="module")
def host():
    with InProcessHost(type="sdxl", checkpoint=str(checkpoint("sdxl"))) as running:
        yield running


@pytest.fixture
def comfy(tmp_path):
    link = tmp_path / "custom_nodes" / "diffusion.launcher"
    link.parent.mkdir()
    link.symlink_to(FOLDER)
    server = ComfyUI(link)
    yield server
    server.close()


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def drawn(host, **fields):
    """What the host itself draws, as ComfyUI holds images."""
    return as_tensor(decode(host.generate_image({**BODY, **fields})["output"]))


def test_sampler_draws_what_the_host_draws_and_shows_its_steps(host, comfy):
    (chosen,) = comfy.run("DiffusionHost", address=host.url("/"))
    image, settings = comfy.run("DiffusionSampler", host=chosen, **INPUTS)
    assert image.dtype == torch.float32 and torch.equal(image, drawn(host))
    assert json.loads(settings)["num_inference_steps"] == 4
    assert comfy.updates[-1][:2] == (4, 4)
    previews = [preview for _, _, preview in comfy.updates if preview is not None]
    assert {(kind, shown.size, limit) for kind, shown, limit in previews} == {
        ("JPEG", (256, 256), 512)
    }


def test_sampler_starts_from_a_image(host, comfy):
    (chosen,) = comfy.run("DiffusionHost", address=host.url(""))
    start = as_tensor(sample_image(64))
    same, near = (
        comfy.run("DiffusionSampler", host=chosen, image=start, strength=strength, **INPUTS)[0]
        for strength in (0.0, 0.5)
    )
    assert same.shape == (1, 64, 64, 3) and not torch.equal(same, near)
    assert (near - same).abs().mean() < (drawn(host) - same).abs().mean()


def test_mask_says_what_may_change(host, comfy):
    (chosen,) = comfy.run("DiffusionHost", address=host.url(""))
    start, mask = as_tensor(sample_image(64)), torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    made, whole = (
        comfy.run("DiffusionSampler", host=chosen, image=start, strength=0.7, **given, **INPUTS)[0]
        for given in ({"mask": mask}, {})
    )
    assert torch.equal(
        made,
        drawn(
            host,
            init_image=encode(sample_image(64)),
            mask_image=encode(half_mask(64, 64)),
            strength=0.7,
        ),
    )
    assert not torch.equal(made, whole)


def test_cancel_in_comfyui_cancels_the_job_and_the_next_image_is_right(host, comfy):
    (chosen,) = comfy.run("DiffusionHost", address=host.url(""))

    def cancel_at_step_three(value, total):
        comfy.is_interrupted = value >= 3

    comfy.on_update = cancel_at_step_three
    with pytest.raises(InterruptProcessingException):
        comfy.run("DiffusionSampler", host=chosen, **{**INPUTS, "steps": 900})
    job = host.queue.jobs()[0]
    assert job.finished.wait(20) and "cancelled" in str(job.error) and job.step < 100
    comfy.on_update = lambda value, total: None
    assert torch.equal(comfy.run("DiffusionSampler", host=chosen, **INPUTS)[0], drawn(host))


def test_lists_come_from_the_host_and_are_short_while_none_runs(host, comfy, monkeypatch):
    declared = {
        name: kind.INPUT_TYPES() for name, kind in comfy.package.NODE_CLASS_MAPPINGS.items()
    }
    nodes = sys.modules[f"{comfy.name}.nodes"]
    monkeypatch.setattr(nodes.hosts.models, "__defaults__", (host.url(""),))
    monkeypatch.setattr(nodes.hosts.schedulers, "__defaults__", (host.url(""),))
    assert nodes.DiffusionHost.INPUT_TYPES()["optional"]["model"][0] == ["any", "sdxl"]
    assert "euler_a" in nodes.DiffusionSampler.INPUT_TYPES()["required"]["scheduler"][0]
    monkeypatch.setattr(nodes.hosts.models, "__defaults__", (f"http://127.0.0.1:{free_port()}",))
    assert nodes.DiffusionHost.INPUT_TYPES()["optional"]["model"][0] == ["any"]
    assert declared["DiffusionSampler"]["required"]["host"] == ("DIFFUSION_HOST",)


@pytest.mark.parametrize(
    ("loader", "sampler", "message"),
    [
        ({"model": "flux"}, {}, "serves sdxl, not flux"),
        ({"address": "http://127.0.0.1:9"}, {}, "does not answer"),
        ({"address": "http://image.example:80", "start": True}, {}, "is not this machine"),
        (
            {},
            {"control_image": torch.zeros(1, 8, 8, 3)},
            "takes no control_image. Start it with --control_net",
        ),
        ({}, {"scheduler": "nonsense"}, "nonsense"),
        ({}, {"mask": torch.zeros(1, 8, 8)}, "a mask needs an image"),
    ],
)
def test_what_is_wrong_is_said_by_the_node(host, comfy, loader, sampler, message):
    with pytest.raises(sys.modules["diffusion_client"].HostError, match=message):
        (chosen,) = comfy.run("DiffusionHost", **{"address": host.url(""), **loader})
        comfy.run("DiffusionSampler", host=chosen, **INPUTS, **sampler)


def test_frames_of_a_video_arrive_one_by_one(comfy):
    with InProcessHost(type="svd", checkpoint=str(checkpoint("svd"))) as host:
        (chosen,) = comfy.run("DiffusionHost", address=host.url(""))
        inputs = {
            **INPUTS,
            "image": as_tensor(sample_image(64)),
            "frames": 3,
            "steps": 2,
            "guidance": -1.0,
        }
        frames, settings = comfy.run("DiffusionSampler", host=chosen, **inputs)
        assert frames.shape == (3, 64, 64, 3) and not torch.equal(frames[0], frames[2])
        assert json.loads(settings)["guidance_scale"] == 3.0


@pytest.mark.slow
def test_loader_starts_a_host_keeps_it_and_replaces_it_when_told_otherwise(comfy):
    port = free_port()
    given = {
        "address": f"http://127.0.0.1:{port}",
        "start": True,
        "arguments": f"--type=sdxl --checkpoint={checkpoint('sdxl')} --height=64 --width=64",
    }
    (chosen,) = comfy.run("DiffusionHost", **given)
    started = sys.modules[f"{comfy.name}.hosts"]._started
    first = started[given["address"]]
    image, _ = comfy.run("DiffusionSampler", host=chosen, **INPUTS)
    assert image.shape == (1, 64, 64, 3)
    comfy.run("DiffusionHost", **given)
    assert started[given["address"]] is first and first.is_running
    with pytest.raises(
        sys.modules["diffusion_client"].HostError, match="type='nonsense' is not a model type"
    ):
        comfy.run("DiffusionHost", **{**given, "arguments": "--type=nonsense"})
    assert not first.is_running
    sys.modules[f"{comfy.name}.hosts"].stop_all()
    assert not started
    assert_port_is_free(port)


def test_started_host_ends_with_the_program_that_started_it():
    argument = f"--checkpoint={checkpoint('sdxl')}"
    program = (
        f"import sys; sys.path.append({str(REPOSITORY / 'clients' / 'python')!r})\n"
        "from diffusion_client.local import LocalHost\n"
        f"host = LocalHost('--type=sdxl', {argument!r})\n"
        "print(host._process.pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    launcher = psutil.Process(int(parent.stdout.readline()))
    wait_until(
        lambda: bool(launcher.children()), within_s=30, what="the launcher has started ranks"
    )
    family = [launcher, *launcher.children(recursive=True)]
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    _, left = psutil.wait_procs(family, timeout=15)
    assert not left
