"""A host whose model is downloaded by its ranks, while it listens."""

import re
import signal

import pytest

from tests.altered import WEIGHTS
from tests.checkpoints import checkpoint
from tests.hosts.harness import (
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
