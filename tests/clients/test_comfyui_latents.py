"""Latents, conditioning and LoRAs in ComfyUI's nodes on a real host, and the example workflows."""

import io
import json
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch

from hosts.http import VERSION
from tests.checkpoints import checkpoint, load, lora
from tests.clients.comfyui import FOLDER, ComfyUI, InterruptProcessingException
from tests.hosts.harness import REPOSITORY, wait_until
from tests.hosts.inprocess import InProcessHost

INPUTS = {
    "positive_text": "a red car",
    "negative_text": "blurry",
    "seed": 5,
    "steps": 4,
    "cfg": 6.0,
}
JOB = {
    "prompt": "a red car",
    "negative_prompt": "blurry",
    "seed": 5,
    "num_inference_steps": 4,
    "guidance_scale": 6.0,
    "height": 64,
    "width": 64,
}
EMPTY = {"samples": torch.zeros(1, 4, 8, 8)}


@pytest.fixture(scope="module")
def host():
    with InProcessHost(
        type="sdxl", checkpoint=str(checkpoint("sdxl")), lora_dir=str(lora("sdxl").parent)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def comfy():
    server = ComfyUI(FOLDER)
    yield server
    server.close()


@pytest.fixture
def sample(host, comfy):
    """Run the sampler's node: its latent's samples and its image."""
    (chosen,) = comfy.run("DiffusionHost", address=host.url(""))

    def run(latent_image=EMPTY, **inputs):
        inputs = {**INPUTS, **inputs}
        latent, image = comfy.run(
            "DiffusionKSampler", host=chosen, latent_image=latent_image, **inputs
        )
        return latent["samples"], image

    return run


@pytest.fixture
def client(host, comfy):
    return sys.modules["diffusion_client"].Client(host.url(""))


def made(client, **fields):
    """The latents and the image that the host itself makes of a request."""
    job = client.submit(**{**JOB, **fields})
    job.wait()
    with np.load(io.BytesIO(job.result("application/x-npz"))) as file:
        return torch.from_numpy(file["latents"]), torch.from_numpy(file["frames"] / np.float32(255))


def npy(comfy, tensor):
    return sys.modules[f"{comfy.name}.latent_nodes"]._npy(tensor)


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_an_empty_latent_gives_the_hosts_image_and_its_latent(sample, client, comfy):
    latent, image = sample()
    assert latent.shape == (1, 4, 8, 8) and image.shape == (1, 64, 64, 3)
    assert latent.dtype == image.dtype == torch.float32
    assert_equal((latent, image), made(client))
    assert comfy.updates[-1][:2] == (4, 4) and comfy.updates[-1][2] is not None


def test_an_empty_latent_of_another_models_channels_gives_its_size_only(sample):
    assert_equal(sample({"samples": torch.zeros(1, 16, 8, 8)}), sample())


def test_denoise_starts_from_the_latent(sample, client, comfy):
    first, _ = sample()
    second = sample({"samples": first}, denoise=0.5, seed=6)
    assert_equal(second, made(client, latents=npy(comfy, first), strength=0.5, seed=6))
    assert not torch.equal(second[0], sample(seed=6)[0])


def test_steps_in_two_ranges_equal_all_steps(sample):
    noisy, _ = sample(end_at_step=2)
    whole = sample()
    assert not torch.equal(noisy, whole[0])
    split = sample({"samples": noisy}, start_at_step=2)
    torch.testing.assert_close(split[0], whole[0], rtol=1e-5, atol=1e-5)  # scaled twice more
    assert (split[1] - whole[1]).abs().max() <= 1 / 255 + 1e-6


def test_each_latent_of_a_batch_has_a_seed_of_its_own(sample, comfy):
    latents, images = sample({"samples": torch.zeros(2, 4, 8, 8)})
    assert comfy.updates[-1][:2] == (8, 8)
    for row in (0, 1):
        one = sample(seed=5 + row)
        assert_equal((latents[row : row + 1], images[row : row + 1]), one)
    picked = sample({"samples": torch.zeros(1, 4, 8, 8), "batch_index": [1]})
    assert torch.equal(picked[0], latents[1:])


def test_conditioning_of_the_graph_gives_the_image_of_its_text(sample):
    pipe = load("sdxl")
    texts = pipe.encode_prompt("a red car", negative_prompt="blurry", device="cpu")
    positive, negative, pooled, negative_pooled = texts
    image = sample(
        positive=[[positive, {"pooled_output": pooled}]],
        negative=[[negative, {"pooled_output": negative_pooled}]],
    )[1]
    assert (image - sample()[1]).abs().max() <= 1 / 255 + 1e-6
    twice = [[positive.repeat(1, 2, 1), {"pooled_output": pooled}]]
    padded = sample(positive=twice, negative=[[negative, {"pooled_output": negative_pooled}]])[1]
    assert (padded - image).abs().max() <= 2 / 255  # attention weighs repeated tokens like one set


def test_loras_are_named_as_the_host_lists_them(sample, client, comfy):
    (listed,) = (one for one in client.loras() if one["path"] == lora("sdxl").name)
    expected = made(client, lora={lora("sdxl").name: 0.5})
    assert not torch.equal(expected[0], sample()[0])
    for name in (listed["name"], lora("sdxl").name):
        (loras,) = comfy.run("DiffusionLora", name=name, weight=0.5)
        assert_equal(sample(loras=loras), expected)
    (both,) = comfy.run("DiffusionLora", name="other", weight=1.0, loras=loras)
    with pytest.raises(sys.modules["diffusion_client"].HostError, match="has no LoRA 'other'"):
        sample(loras=both)


def test_sampler_and_schedule_are_ksamplers(sample, client):
    found = sample(sampler_name="euler_ancestral")
    assert_equal(found, made(client, scheduler={"scheduler": "euler_a"}))
    found = sample(sampler_name="dpmpp_2m", scheduler="karras")
    settings = {"scheduler": "dpmpp_2m", "use_karras_sigmas": True}
    assert_equal(found, made(client, scheduler=settings))


def test_schedules_are_those_of_the_hosts_a1111_api(comfy):
    from hosts.dialects.a1111_samplers import ALIASES, SCHEDULES

    own = sys.modules[f"{comfy.name}.samplers"].SCHEDULES
    assert own == {name: SCHEDULES[ALIASES.get(name, name)] for name in own}


EMBEDS = torch.zeros(1, 77, 64)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"positive": [[EMBEDS, {}], [EMBEDS, {}]]}, "positive holds 2 conditionings"),
        ({"positive": [[EMBEDS, {"area": (8, 8, 0, 0)}]]}, "positive holds 'area'"),
        ({"negative": [[EMBEDS, {}]]}, "negative is connected, and positive is not"),
        ({"latent_image": {"samples": torch.zeros(1, 4, 3, 8, 8)}}, "latent_image has 5 dim"),
        (
            {"latent_image": {**EMPTY, "noise_mask": torch.zeros(1, 64, 64)}},
            "latent_image has a noise mask",
        ),
        ({"control_image": torch.zeros(1, 64, 64, 3)}, "takes no control_image. Start it with"),
        ({"ip_image": torch.zeros(1, 64, 64, 3)}, "takes no ip_image. Start it with"),
        ({"sampler_name": "nonsense"}, "nonsense"),
    ],
)
def test_what_a_host_cannot_do_is_said_by_the_node(sample, inputs, message):
    with pytest.raises(sys.modules["diffusion_client"].HostError, match=message):
        sample(**inputs)


def test_cancel_in_comfyui_cancels_every_job_of_the_batch(sample, client, comfy):
    def cancel_from_step_three(value, total):
        comfy.is_interrupted = comfy.is_interrupted or value >= 3  # not every step is looked at

    comfy.on_update = cancel_from_step_three
    with pytest.raises(InterruptProcessingException):
        sample({"samples": torch.zeros(3, 4, 8, 8)}, steps=200)
    comfy.on_update = lambda value, total: None
    wait_until(
        lambda: [job.state for job in client.jobs()[:3]] == ["cancelled"] * 3,
        within_s=30,
        what="all are cancelled",
    )
    assert sample()[1].shape == (1, 64, 64, 3)


def test_nodes_keep_comfyuis_contract(comfy):
    """What its server and page read of a node before it runs."""
    package = comfy.package
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    for name, kind in package.NODE_CLASS_MAPPINGS.items():
        declared = kind.INPUT_TYPES()
        assert set(declared) <= {"required", "optional", "hidden"}, name
        json.dumps(declared)  # GET /object_info
        for inputs in declared.values():
            for wanted, *options in inputs.values():
                assert isinstance(wanted, str | list) and len(options) <= 1
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
        assert callable(getattr(kind, kind.FUNCTION)) and kind.DESCRIPTION and kind.CATEGORY
        # the same inputs have the same result, so that ComfyUI may keep it
        assert not hasattr(kind, "IS_CHANGED"), name
    check = package.NODE_CLASS_MAPPINGS["DiffusionKSampler"].VALIDATE_INPUTS
    assert check(sampler_name="euler", scheduler="karras") is True
    assert "Allowed: normal, simple" in check(scheduler="ddim_uniform")


WORKFLOWS = sorted((FOLDER / "workflows").glob("*.json"))
CORE = {
    "EmptyLatentImage": lambda width, height, batch_size: (
        {"samples": torch.zeros(batch_size, 4, height // 8, width // 8)},
    ),
    "LatentUpscaleBy": lambda samples, upscale_method, scale_by: (
        {
            "samples": torch.nn.functional.interpolate(
                samples["samples"], scale_factor=scale_by, mode=upscale_method
            )
        },
    ),
    "SaveImage": lambda images, filename_prefix: (images,),
    "DualCLIPLoader": lambda **names: (load("sdxl"),),
    "CLIPTextEncode": lambda clip, text: ([[*_encoded(clip, text)]],),
}
"""ComfyUI's own nodes that the workflows use."""


def _encoded(pipe, text):
    embeds, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
    return embeds, {"pooled_output": pooled}


def queued(comfy, graph, host):
    """The images of each SaveImage of a graph in ComfyUI's API format, on a small host."""
    small = {"width": 64, "height": 64, "address": host.url(""), "steps": 4, "name": "lora"}
    cut = {"end_at_step": 2, "start_at_step": 2}
    done: dict[str, tuple] = {}

    def value_of(name, value):
        if isinstance(value, list):
            return run(value[0])[value[1]]
        return {**small, **cut, "name": lora("sdxl").name}.get(name, value)

    def run(number):
        if number not in done:
            node = graph[number]
            inputs = {name: value_of(name, value) for name, value in node["inputs"].items()}
            own = CORE.get(node["class_type"])
            done[number] = own(**inputs) if own else comfy.run(node["class_type"], **inputs)
        return done[number]

    return [run(number)[0] for number, node in graph.items() if node["class_type"] == "SaveImage"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflow_runs(path, comfy, host):
    graph = json.loads(path.read_text())
    (images,) = queued(comfy, graph, host)
    size = 96 if path.stem == "two_passes" else 64
    assert images.shape == (2 if "batch" in path.stem else 1, size, size, 3)
    assert images.std() > 0


def test_there_are_workflows_of_every_node(comfy):
    used = {
        node["class_type"] for path in WORKFLOWS for node in json.loads(path.read_text()).values()
    }
    assert set(comfy.package.NODE_CLASS_MAPPINGS) <= used


def test_published_folder_has_the_registrys_fields_and_works_without_the_repository(tmp_path, host):
    """`make comfyui`, as a program of its own: the client library must come from that folder."""
    subprocess.run(["make", "comfyui"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    folder = shutil.move(REPOSITORY / "dist" / "comfyui", tmp_path / "published")
    facts = tomllib.loads((folder / "pyproject.toml").read_text())
    assert {"name", "version", "license", "description"} <= set(facts["project"])
    assert facts["project"]["version"] == VERSION
    assert {"PublisherId", "DisplayName", "Icon", "includes"} <= set(facts["tool"]["comfy"])
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pathlib import Path\n"
        "from tests.clients.comfyui import ComfyUI\n"
        f"server = ComfyUI(Path({str(folder)!r}))\n"
        f"server.run('DiffusionHost', address={host.url('')!r})\n"
        "print(sys.modules['diffusion_client'].__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(folder))
