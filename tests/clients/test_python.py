"""The Python client and the `generate` command against a real host."""

import http.server
import importlib
import io
import re
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from tests.checkpoints import checkpoint
from tests.clients.cutter import Cutter
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


@pytest.fixture
def cutter(host):
    proxy = Cutter(host.port)
    yield proxy
    proxy.cut()


def test_job_is_followed_through_an_outage_to_its_image(host, library, cutter):
    client = library.Client(cutter.url)
    job = client.submit(**{**FIELDS, "num_inference_steps": 100})
    is_cut = False
    for state in job.follow(previews=True):
        if state.step >= 2 and not is_cut:
            is_cut = True
            cutter.cut()
            threading.Timer(0.7, cutter.mend).start()
    assert is_cut and job.state.state == "done" and job.state.step == 100
    assert Image.open(io.BytesIO(job.result())).size == (64, 64)


@pytest.mark.parametrize(
    ("patience_s", "said"), [(0, "was lost"), (1.0, "was asked again for 1 s")]
)
def test_patience_with_an_outage_ends(host, library, cutter, patience_s, said):
    client = library.Client(cutter.url, patience_s=patience_s)
    job = client.submit(**{**FIELDS, "num_inference_steps": 900})
    with pytest.raises(library.HostError, match=said) as caught:
        for state in job.follow():
            if state.step >= 2:
                cutter.cut()
    assert caught.value.status == 0
    library.Client(host.url("")).job(job.id).cancel()


def test_job_is_abandoned_also_if_the_host_is_back_only_later(host, library, cutter):
    job = library.Client(cutter.url).submit(**{**FIELDS, "num_inference_steps": 900})
    cutter.cut()
    job.abandon()
    with pytest.raises(library.HostError, match="does not answer"):
        job.cancel()
    cutter.mend()
    found = host.queue.find(job.id)
    assert found.finished.wait(20) and "cancelled" in str(found.error)


@pytest.mark.parametrize(
    "address",
    ["", "hello world", "127.0.0.1:6000", "http://", "http://a:b", "ftp://a", "http://a b"],
)
def test_address_that_is_none_is_named(library, address):
    with pytest.raises(library.HostError, match=re.escape(f"the address {address!r} is not allow")):
        library.Client(address)


class Other(http.server.BaseHTTPRequestHandler):
    """A web server that is no host."""

    def do_GET(self):
        if self.path.startswith("/found"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")
        else:
            self.send_error(404)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("path", ["", "/found"])
def test_something_else_at_the_address_is_named(library, path):
    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}{path}"
        client = library.Client(address)
        for ask in (client.models, client.submit, client.jobs, client.cluster, client.health):
            with pytest.raises(library.HostError, match=re.escape(address)):
                ask()
        server.shutdown()


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
    assert "note:" not in done.stderr
    long = generate("a red car " * 60, f"--url={host.url('')}", f"--out={file}", "--quiet")
    assert "tokens of the prompt were not read" in long.stderr


def test_command_says_in_one_line_what_is_wrong(host, tmp_path):
    for arguments, said in (
        (["a", f"--url={host.url('')}", "--num_inference_steps=0"], "steps=0 is not allowed"),
        (["a", f"--url=http://127.0.0.1:{free_port()}"], "does not answer"),
        (["a", "--url=hello world"], "the address 'hello world' is not allowed"),
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
