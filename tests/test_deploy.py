"""The examples of docs/deploy/: they are run where their programs are installed, else only read."""

import base64
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import urllib3
import yaml
from PIL import Image

from hosts.http.server import Listener
from hosts.launch.command_line import parse_command_line
from tests.hosts.dialects.reading import ReadingHost
from tests.hosts.harness import free_port

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "docs" / "deploy"
KEY = "0123456789abcdef-secret"
PROXIES = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=name))
    for name in ("nginx", "caddy")
]


def commands():
    """Example -> the launcher's arguments in it."""
    unit = (DEPLOY / "diffusion-launcher.service").read_text()
    start = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    found = {
        "unit": shlex.split(start)[2:],
        "compose": compose["services"]["diffusion"]["command"],
    }
    for name in ("nginx.conf", "Caddyfile"):
        found[name] = re.search(r"^#   (--.*)$", (DEPLOY / name).read_text(), re.MULTILINE)[
            1
        ].split()
    return found


@pytest.mark.parametrize("example", ["unit", "compose", "nginx.conf", "Caddyfile"])
def test_arguments_of_examples_are_the_launchers(example, tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    given = [re.sub(r"^(--api_key)=.*", rf"\1=@{key}", each) for each in commands()[example]]
    settings = parse_command_line(given)
    assert settings.api_key == KEY and len(settings.given) + 1 == len(given)


def test_container_has_what_its_examples_name():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["diffusion"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    user = re.search(r"^USER (\w+)$", dockerfile, re.MULTILINE)[1]
    assert user != "root" and f" {user} " in dockerfile
    state = next(each[9:] for each in service["command"] if each.startswith("--state_dir"))[3:]
    assert f"VOLUME {state}" in dockerfile and any(
        each.endswith(f":{state}") for each in service["volumes"]
    )
    port = re.search(r"^EXPOSE (\d+)$", dockerfile, re.MULTILINE)[1]
    assert all(each.endswith(f":{port}") for each in service["ports"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze")
def test_unit_is_valid(tmp_path):
    text = (DEPLOY / "diffusion-launcher.service").read_text()
    unit = tmp_path / "diffusion-launcher.service"
    unit.write_text(
        text.replace("/opt/diffusion-launcher/.venv/bin/python", sys.executable).replace(
            "/opt/diffusion-launcher", str(ROOT)
        )
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True
    )
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-subj", "/CN=draw.example",
         "-addext", "subjectAltName=DNS:draw.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def nginx_command(folder, tls, port, host_port):
    example = (DEPLOY / "nginx.conf").read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:6000", f"127.0.0.1:{host_port}"),
        ("/etc/ssl/draw.example.pem", f"{tls}/cert.pem"),
        ("/etc/ssl/draw.example.key", f"{tls}/key.pem"),
    ):
        assert old in example
        example = example.replace(old, new)
    (folder / "example.conf").write_text(example)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;\n"
        f"events {{}}\nhttp {{ access_log off;\n{paths}include {folder}/example.conf;\n}}\n"
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy_command(folder, tls, port, host_port):
    example = (DEPLOY / "Caddyfile").read_text()
    site = f"https://draw.example:{port} {{\n\tbind 127.0.0.1\n\ttls {tls}/cert.pem {tls}/key.pem"
    assert "\ndraw.example {" in example and "127.0.0.1:6000" in example
    example = example.replace("\ndraw.example {", f"\n{site}")
    example = example.replace("127.0.0.1:6000", f"127.0.0.1:{host_port}")
    options = "{\n\tadmin off\n\tauto_https disable_redirects\n}\n"
    (folder / "Caddyfile").write_text(options + example)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


class Site:
    """A proxy with the example's configuration, and the host behind it."""

    def __init__(self, host, port, tls):
        self.host, self.root = host, f"https://draw.example:{port}/gpu"
        self._pool = urllib3.HTTPSConnectionPool(
            "127.0.0.1",
            port,
            ca_certs=str(tls / "cert.pem"),
            server_hostname="draw.example",
            assert_hostname="draw.example",
            retries=False,
            timeout=30,
        )
        self._name = f"draw.example:{port}"

    def ask(self, method, path, *, key=True, headers=None, body=None, **options):
        sent = {"Host": self._name, **(headers or {})}
        if key:
            sent["Authorization"] = f"Bearer {KEY}"
        if isinstance(body, dict):
            body, sent["Content-Type"] = json.dumps(body), "application/json"
        return self._pool.request(method, path, headers=sent, body=body, redirect=False, **options)


@pytest.fixture(params=PROXIES)
def site(request, tmp_path, certificate, monkeypatch):
    port, host_port = free_port(), free_port()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    settings = {
        "public_url": f"https://draw.example:{port}/gpu",
        "trusted_proxies": "127.0.0.1",
        "api_key": KEY,
    }
    command = {"nginx": nginx_command, "caddy": caddy_command}[request.param]
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(ReadingHost(**settings))
        listener = Listener(host.client.application, host="127.0.0.1", port=host_port)
        listener.bind()
        listener.serve()
        stack.callback(listener.stop)
        log = stack.enter_context((tmp_path / "log").open("wb"))
        arguments = command(tmp_path, certificate, port, host_port)
        proxy = subprocess.Popen(arguments, stdout=log, stderr=log)
        stack.callback(proxy.wait, 20)
        stack.callback(proxy.terminate)
        found = Site(host, port, certificate)
        _wait_until_it_answers(found, proxy, tmp_path / "log")
        yield found


def _wait_until_it_answers(site, proxy, log):
    deadline = time.monotonic() + 30
    while True:
        try:
            assert site.ask("GET", "/gpu/livez").status == 200
            return
        except urllib3.exceptions.HTTPError:
            assert proxy.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def test_host_behind_the_examples_proxy(site):
    """One test for all: what each needs is the running proxy."""
    moved = site.ask("GET", "/gpu")
    assert moved.status == 301 and moved.headers["Location"].endswith("/gpu/")
    assert b"<html" in site.ask("GET", "/gpu/", key=False).data
    assert site.ask("GET", "/gpu/v1/jobs", key=False).status == 401

    origin = {"Origin": site.root.removesuffix("/gpu")}
    asked = {"prompt": "a", "response_format": "url"}
    made = site.ask("POST", "/gpu/v1/images/generations", body=asked, headers=origin)
    assert made.status == 200, made.data
    link = json.loads(made.data)["data"][0]["url"]
    assert link.startswith(f"{site.root}/v1/jobs/")
    image = site.ask("GET", link.removeprefix(site.root.removesuffix("/gpu")), key=False)
    assert image.status == 200 and image.data[:4] == b"\x89PNG"
    foreign = {"Origin": "https://evil.example"}
    assert site.ask("POST", "/gpu/v1/jobs", body=asked, headers=foreign).status == 403

    queued = site.ask("POST", "/gpu/v1/jobs", body={"prompt": "a"})
    assert queued.status == 202 and queued.headers["Location"].startswith("/gpu/v1/jobs/")


def test_large_images_pass_the_examples_proxy(site):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="PNG")
    assert buffer.tell() > 2 * 10**6
    body = {"prompt": "a", "image": base64.b64encode(buffer.getvalue()).decode()}
    assert site.ask("POST", "/gpu/v1/images/edits", body=body).status == 200


def test_events_pass_the_examples_proxy_when_they_happen(site):
    """The first one arrives while the job runs, so the proxy does not collect them."""
    site.host.hold.clear()
    made = json.loads(site.ask("POST", "/gpu/v1/jobs", body={"prompt": "a"}).data)
    stream = site.ask("GET", f"/gpu/v1/jobs/{made['id']}/events", preload_content=False)
    chunks = stream.stream()
    first = next(chunks)
    assert first.startswith(b"event: status") and not site.host.hold.is_set()
    site.host.hold.set()
    assert b'"state": "done"' in b"".join(chunks)
