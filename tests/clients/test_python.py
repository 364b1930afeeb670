"""The Python client and the `generate` command against a real host."""

import importlib
import io
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from tests.checkpoints import checkpoint
from tests.hosts.harness import LAUNCHER, REPOSITORY, free_port, wait_until
from tests.hosts.inprocess import InProcessHost

FIELDS = {"prompt": "a red car", "seed": 5, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def host():
    with InProcessHost(type="sdxl", checkpoint=str(checkpoint("sdxl"))) as running:
        yield running


@pytest.fixture
def library(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "clients" / "python"))
    return importlib.import_module("diffusion_client")


def test_client_follows_a_job_to_its_image(host, library):
    client = library.Client(host.url(""))
    job = client.submit(**FIELDS)
    states = list(job.follow())
    assert states[-1].state == "done" and states[-1].settings["prompt"] == "a red car"
    assert job.result() == client.generate(**FIELDS) == client.job(job.id).result()
    assert Image.open(io.BytesIO(job.result("image/webp"))).format == "WEBP"
    assert "prompt" in client.schema()["components"]["schemas"]["Request"]["properties"]


def test_client_cancels_and_raises_what_the_host_says(host, library):
    client = library.Client(host.url(""))
    job = client.submit(**{**FIELDS, "num_inference_steps": 900})
    threading.Timer(0.5, job.cancel).start()
    with pytest.raises(library.HostError, match="cancelled"):
        job.wait()
    with pytest.raises(library.HostError, match="steps=0 is not allowed") as caught:
        client.submit(num_inference_steps=0)
    assert caught.value.status == 400
    with pytest.raises(library.HostError, match="does not answer"):
        library.Client(f"http://127.0.0.1:{free_port()}").submit(**FIELDS)


def generate(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, str(LAUNCHER), "generate", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def test_command_writes_the_image(host, tmp_path):
    file = tmp_path / "car.png"
    done = generate(
        "a red car", f"--url={host.url('')}", f"--out={file}", "--seed=5", "--num_inference_steps=3"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{file} (seed 5, ")
    assert Image.open(file).size == (64, 64)


def test_command_says_in_one_line_what_is_wrong(host, tmp_path):
    for arguments, said in (
        (["a", f"--url={host.url('')}", "--num_inference_steps=0"], "steps=0 is not allowed"),
        (["a", f"--url=http://127.0.0.1:{free_port()}"], "does not answer"),
    ):
        done = generate(*arguments, cwd=tmp_path)
        assert (
            (done.returncode, done.stdout) == (2, "")
            and said in done.stderr
            and done.stderr.count("\n") == 1
        )


def test_interrupted_command_cancels_its_job(host, tmp_path):
    command = subprocess.Popen(
        [
            sys.executable,
            str(LAUNCHER),
            "generate",
            "a",
            f"--url={host.url('')}",
            "--num_inference_steps=900",
        ],
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell ignores it for what it starts in the background
    )
    wait_until(
        lambda: (
            host.queue.jobs()
            and host.queue.jobs()[0].step > 0
            and not host.queue.jobs()[0].finished.is_set()
        ),
        within_s=60,
        what="it runs",
    )
    job = host.queue.jobs()[0]
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=20) == 130
    assert job.finished.wait(20) and "cancelled" in str(job.error)
