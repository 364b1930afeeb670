"""Published clients that are not in the tests' own environment: OpenAI's package for Node, LiteLLM,
and Prometheus' reading of the metrics. Each is installed into a temporary folder.
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from tests.checkpoints import sample_image
from tests.hosts.client import decode

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "published.mjs"
LITELLM = """
import json, sys
import litellm

base, path = sys.argv[1:]
given = {"model": "openai/sdxl", "api_base": base, "api_key": "anything"}
fields = {"prompt": "a red car", "size": "64x64"}
extra = {"seed": 5, "steps": 3, "guidance": 5, "response_format": "b64_json"}
drawn = litellm.image_generation(**given, **fields, n=2, extra_body=extra)
edited = litellm.image_edit(
    **given, image=open(path, "rb"), prompt="a red car", extra_body={**extra, "strength": 0.5}
)
try:
    litellm.image_generation(**given, **fields, extra_body={"seeed": 1})
except litellm.BadRequestError as error:
    refused = str(error)
images = [image.b64_json for image in drawn.data]
print(json.dumps({"images": images, "edited": edited.data[0].b64_json, "error": refused}))
"""


def run(*command: str, folder: Path) -> str:
    offline = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        command, cwd=folder, env=offline, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.fixture
def picture(tmp_path):
    sample_image(64).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture
def wanted(host, picture):
    """The images of seeds 5 and 6, and one that is changed, as the host's own route draws them."""
    fields = {"positive": "a red car", "steps": 3, "cfg": 5.0, "width": 64, "height": 64}
    start = {"init_image": base64.b64encode(picture.read_bytes()).decode(), "strength": 0.5}
    return [
        np.asarray(decode(host.generate_image({**fields, **more})["output"]))
        for more in ({"seed": 5}, {"seed": 6}, {"seed": 5, **start})
    ]


def require_same(found, wanted):
    for image, want in zip([*found["images"], found["edited"]], wanted, strict=True):
        assert (pixels(image) == want).all()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_openais_package_for_node(host, wanted, picture, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    run("npm", "install", "--silent", "--no-audit", "--no-fund", "openai@6", folder=tmp_path)
    found = json.loads(run("node", SCRIPT.name, host.url("/v1"), str(picture), folder=tmp_path))
    assert found["models"] == ["sdxl"]
    require_same(found, wanted)
    assert (pixels(found["linked"]) == wanted[0]).all()
    kinds = [kind for kind, _ in found["events"]]
    assert kinds == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert all(pixels(image).shape == (64, 64, 3) for _, image in found["events"])
    name, status, param, message = found["error"]
    assert (name, status, param) == ("BadRequestError", 400, "seeed")
    assert "The nearest one is seed" in message


def test_litellm(host, wanted, picture, tmp_path):
    run(sys.executable, "-m", "venv", "venv", folder=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "litellm==1.*", folder=tmp_path)
    found = json.loads(
        run(python, "-c", LITELLM, host.url("/v1"), str(picture), folder=tmp_path).splitlines()[-1]
    )
    require_same(found, wanted)
    assert "The nearest one is seed" in found["error"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="prometheus is not installed")
def test_prometheus_accepts_the_metrics(host, wanted):
    text = requests.get(host.url("/metrics"), timeout=20).text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
