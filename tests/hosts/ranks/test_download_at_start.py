"""A host whose model is downloaded by its ranks, while it listens."""

import re
import shutil
import signal

import pytest

from tests.altered import WEIGHTS
from tests.checkpoints import checkpoint, single_file
from tests.hosts.cluster.harness import start_cluster
from tests.hosts.harness import (
    READY_WITHIN_S,
    free_port,
    run_launcher,
    start_client_host,
    start_launcher,
    wait_until,
)

ARGUMENTS = ("--checkpoint=acme/tiny", "--nproc_per_node=2", "--height=64", "--width=64")


def test_two_ranks_download_a_model_once_while_the_host_listens(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    hub.hold.clear()
    with start_launcher(*ARGUMENTS, "--backend=distrifuser") as host:
        host.wait_until_listening()
        wait_until(
            lambda: "downloading" in host.get("/readyz").text, within_s=120, what="downloading"
        )
        said = host.get("/readyz")
        assert re.fullmatch(r"loading: downloading \d\.\d of 2\.4 MB", said.text)
        assert (said.status_code, host.status()) == (503, 202)
        assert host.get("/healthz").json()["reason"].startswith("downloading")
        hub.hold.set()
        host.wait_until_ready()
        assert host.post({"positive": "a cat", "steps": 2}).status_code == 200
        assert "download" not in host.get("/settings").json()
        assert "downloading 0.0 of 2.4 MB" in host.log
    assert sorted(hub.downloads(".safetensors")) == sorted(
        name for name in hub.repositories["acme/tiny"].files if name.endswith(".safetensors")
    )


@pytest.mark.slow
def test_a_download_that_breaks_off_ends_the_host_with_its_reason(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    hub.break_after[f"unet/{WEIGHTS}"] = [0] * 20
    done = run_launcher(*ARGUMENTS, f"--port={free_port()}", timeout_s=170)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: --checkpoint=acme/tiny: the download broke off at")
    assert last.endswith("Start again: it goes on from there.")


@pytest.mark.slow
def test_a_host_that_is_stopped_ends_its_download(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    hub.hold.clear()
    with start_launcher(*ARGUMENTS) as host:
        host.wait_until_listening()
        wait_until(
            lambda: "downloading" in host.get("/readyz").text, within_s=120, what="downloading"
        )
        assert any("worker" in " ".join(process.cmdline()) for process in host.tree())
        host.signal_and_wait(signal.SIGTERM, within_s=15)


@pytest.mark.slow
def test_ranks_of_a_clients_own_torchrun_find_and_download_a_model_once(hub):
    """No launcher has asked the hub before them: both ranks do at once."""
    hub.add("acme/tiny", checkpoint("sdxl"))
    arguments = ("--checkpoint=acme/tiny", "--type=sdxl", "--height=64", "--width=64")
    with start_client_host("host_asyncdiff.py", *arguments, "--model_n=2", num_ranks=2) as host:
        host.wait_until_ready()
        assert host.post({"positive": "a cat", "steps": 2}).status_code == 200
    files = [name for name in hub.repositories["acme/tiny"].files if name.endswith("tensors")]
    assert sorted(hub.downloads(".safetensors")) == sorted(files)


@pytest.mark.slow
def test_host_of_a_clients_own_torchrun_answers_why_it_cannot_download(hub):
    with start_client_host("host_asyncdiff.py", "--checkpoint=acme/none", "--type=sdxl") as host:
        host.wait_until_ready()
        answer = host.post({"positive": "a cat"})
        assert answer.status_code == 503
        assert "--checkpoint=acme/none is neither a path" in answer.json()["message"]


@pytest.mark.slow
def test_a_client_of_the_v2_protocol_applies_a_name(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    weights = {name for name in hub.repositories["acme/tiny"].files if name.endswith("tensors")}
    body = {
        "backend_config": {}, "checkpoint": {"checkpoint": "acme/tiny"}, "pipeline_type": "sdxl",
        "variant": "fp32", "vae_fp16": False, "enable_vae_tiling": False,
        "enable_vae_slicing": False, "enable_attention_slicing": False, "xformers_efficient": False,
    }  # fmt: skip
    size = ("--height=64", "--width=64")
    with start_client_host("host_distrifuser.py", *size, num_ranks=2) as host:
        host.wait_until_listening()
        applied = host.session.post(host.url("/apply"), json=body, timeout=READY_WITHIN_S)
        assert (applied.status_code, applied.text) == (200, ""), host.log
        asked = {"positive": "a cat", "steps": 2, "width": 64, "height": 64, "cfg": 3}
        assert host.post(asked).status_code == 200, host.log
        missing = {**body, "checkpoint": {"checkpoint": "acme/none"}}
        refused = host.session.post(host.url("/apply"), json=missing, timeout=READY_WITHIN_S)
        assert refused.status_code >= 400
        assert "acme/none is neither a path on this machine" in refused.text
    assert sorted(hub.downloads(".safetensors")) == sorted(weights)


@pytest.mark.slow
def test_a_gateways_replicas_take_a_name_and_download_it_once(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    weights = {name for name in hub.repositories["acme/tiny"].files if name.endswith("tensors")}
    key = "0123456789abcdef"
    size = ("--height=64", "--width=64")
    options = ("--checkpoint=acme/tiny", "--replicas=2", f"--api_key={key}", *size)
    with start_cluster(*options, key=key) as cluster:
        cluster.wait_for_replicas(2)
        job = cluster.client.submit(prompt="a red car", num_inference_steps=2)
        assert job.wait().state == "done"
    assert sorted(hub.downloads(".safetensors")) == sorted(weights)


@pytest.mark.slow
def test_two_ranks_serve_one_file_whose_configuration_comes_from_the_hub(hub, tmp_path):
    hub.add("stabilityai/stable-diffusion-3-medium-diffusers", checkpoint("sd3"))
    file = tmp_path / "sd3_medium.safetensors"
    shutil.copy(single_file("sd3", seed=1, holds=("vae",)), file)
    size = ("--height=64", "--width=64", "--nproc_per_node=2", "--shard=always")
    with start_launcher(f"--checkpoint={file}", *size) as host:
        host.wait_until_ready()
        asked = {"prompt": "a cat", "seed": 1, "num_inference_steps": 2}
        assert host.post(asked).status_code == 200, host.log
    assert not [name for name in hub.downloads(".safetensors") if "text_encoder" not in name]
