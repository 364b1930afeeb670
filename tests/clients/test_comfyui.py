"""The ComfyUI nodes in as much of ComfyUI as they meet, on real hosts."""

import json
import signal
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
import torch

from backends.generation.schedulers import SCHEDULERS
from tests.backends.features import half_mask
from tests.checkpoints import checkpoint, sample_image
from tests.clients.comfyui import FOLDER, ComfyUI, InterruptProcessingException
from tests.clients.cutter import Cutter
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


@pytest.fixture
def proxy(host):
    cutter = Cutter(host.port)
    yield cutter
    cutter.cut()


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


def test_lists_are_whole_for_a_host_at_any_address(comfy):
    declared = {
        name: kind.INPUT_TYPES() for name, kind in comfy.package.NODE_CLASS_MAPPINGS.items()
    }
    samplers = declared["DiffusionSampler"]["required"]["scheduler"][0]
    assert samplers == ["the model's own", *SCHEDULERS]
    assert declared["DiffusionHost"]["optional"]["model"][0] == "STRING"
    assert declared["DiffusionSampler"]["required"]["host"] == ("DIFFUSION_HOST",)
    assert all(len(title) < 20 for title in comfy.package.NODE_DISPLAY_NAME_MAPPINGS.values())


def test_job_is_shown_although_the_host_was_out_of_reach(host, comfy, proxy):
    (chosen,) = comfy.run("DiffusionHost", address=proxy.url)

    def cut_once(value, total):
        if value >= 2 and not proxy.is_cut:
            proxy.cut()
            threading.Timer(0.7, proxy.mend).start()

    comfy.on_update = cut_once
    image, _ = comfy.run("DiffusionSampler", host=chosen, **{**INPUTS, "steps": 40})
    assert proxy.is_cut and torch.equal(image, drawn(host, steps=40))


def test_cancel_in_an_outage_is_comfyuis_own_and_reaches_the_host_later(host, comfy, proxy):
    (chosen,) = comfy.run("DiffusionHost", address=proxy.url)

    def cut_and_cancel(value, total):
        if value >= 2 and not proxy.is_cut:
            proxy.cut()
            comfy.is_interrupted = True

    comfy.on_update = cut_and_cancel
    with pytest.raises(InterruptProcessingException):
        comfy.run("DiffusionSampler", host=chosen, **{**INPUTS, "steps": 900})
    proxy.mend()
    job = host.queue.jobs()[0]
    assert job.finished.wait(20) and "cancelled" in str(job.error)


def test_outage_beyond_the_patience_is_said_by_the_node(host, comfy, proxy):
    (chosen,) = comfy.run("DiffusionHost", address=proxy.url)
    comfy.on_update = lambda value, total: None if proxy.is_cut else proxy.cut()
    with pytest.raises(sys.modules["diffusion_client"].HostError, match="asked again for 1 s"):
        comfy.run("DiffusionSampler", host=chosen, **{**INPUTS, "steps": 900}, patience=1)
    host.queue.cancel(host.queue.jobs()[0])


KEY = "a-key-of-this-test"


def test_key_comes_from_a_file_and_goes_to_its_address_only(comfy, tmp_path, monkeypatch):
    settings = {"type": "sdxl", "checkpoint": str(checkpoint("sdxl")), "api_key": KEY}
    inputs = comfy.package.NODE_CLASS_MAPPINGS["DiffusionHost"].INPUT_TYPES()
    assert "api_key" not in inputs["required"] | inputs["optional"]
    error = sys.modules["diffusion_client"].HostError
    with InProcessHost(**settings) as guarded:
        file = tmp_path / "keys"
        monkeypatch.setenv("DIFFUSION_HOST_KEYS", str(file))
        file.write_text(f"# of the studio\n{guarded.url('/')} {KEY}\n")
        (chosen,) = comfy.run("DiffusionHost", address=guarded.url("/"))
        assert KEY not in repr(chosen)
        file.write_text(f"http://127.0.0.1:9 {KEY}\n")
        with pytest.raises(error, match=r"bearer|Bearer"):
            comfy.run("DiffusionHost", address=guarded.url(""))
    file.write_text(KEY)
    with pytest.raises(error, match=r"line 1 of .* has 1 words"):
        comfy.run("DiffusionHost", address="http://127.0.0.1:9")
    file.unlink()
    with pytest.raises(error, match="cannot be read"):
        comfy.run("DiffusionHost", address="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--type=sdxl --host=0.0.0.0", "--host"),
        ("--type=sdxl --host 0.0.0.0", "--host"),
        ("--api-key=theirs", "--api_key"),
        ("--config=/tmp/theirs.yaml", "--config"),
        ("--lora-dir=/", "--lora_dir"),
        ("--state_dir=/", "--state_dir"),
        ("--image_dirs=/", "--image_dirs"),
        ("--deployments={}", "--deployments"),
        ("--ray_address=10.0.0.1:6379", "--ray_address"),
        ("--rdzv-endpoint=10.0.0.1:7000", "--rdzv_endpoint"),
        ("--rdzv_key=theirs", "--rdzv_key"),
        ("--api_keys=/tmp/theirs --share_jobs", "--api_keys"),
        ("--share-jobs", "--share_jobs"),
        ("agent {}", "'agent' is no argument"),
        ("--type='sdxl", "cannot be read"),
    ],
)
def test_workflow_cannot_open_the_host_that_it_starts(comfy, arguments, named):
    given = {"address": f"http://127.0.0.1:{free_port()}", "start": True, "arguments": arguments}
    with pytest.raises(sys.modules["diffusion_client"].HostError, match=f"arguments.*{named}"):
        comfy.run("DiffusionHost", **given)
    assert not sys.modules[f"{comfy.name}.hosts"]._started


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
        ({}, {"image": torch.zeros(3, 8, 8, 3)}, "image is a batch of 3, and one is allowed"),
        (
            {},
            {"image": torch.zeros(1, 64, 64, 3), "mask": torch.zeros(2, 64, 64)},
            "mask is a batch of 2, and one is allowed",
        ),
        ({"address": "hello world"}, {}, "the address 'hello world' is not allowed"),
        ({"address": ""}, {}, "the address '' is not allowed"),
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
