"""Published clients that are not in the tests' own environment: OpenAI's package for Node, the AI
SDK, LiteLLM, sd-backend-client, and Prometheus' reading of the metrics. Each is installed into a
temporary folder.
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
AI_SDK = """
import fs from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { generateImage } from "ai";
const [base, path] = process.argv.slice(2);
const model = createOpenAI({ baseURL: base, apiKey: "anything" }).image("gpt-image-2");
const given = { model, size: "64x64", maxRetries: 0 };
const openai = { inputFidelity: "high", quality: "high" };
const found = [
  await generateImage({ ...given, prompt: "a red car" }),
  await generateImage({
    ...given, prompt: { text: "a red car", images: [fs.readFileSync(path)] },
    providerOptions: { openai },
  }),
];
console.log(JSON.stringify(found.map((each) => each.image.base64)));
"""
BACKEND_CLIENT = """
import base64, io, json, sys
from PIL import Image
from sd_backend_client.api.a1111_webservice import DiffusionRequestBody
from sd_backend_client.api.detect import connect_to_backend

client, start = connect_to_backend(sys.argv[1]), Image.open(sys.argv[2])
lists = [client.get_models(), client.get_samplers(), client.get_upscalers(), client.get_loras()]
assert lists[0][0].title == "sdxl" and client.get_capabilities().controlnet is False
assert client.progress_check().state.job_count == 0
fields = {"prompt": "a red car", "seed": 5, "steps": 3, "cfg_scale": 5, "width": 64, "height": 64}
body = DiffusionRequestBody(**fields, sampler="euler_ancestral")
found = [client.txt2img(body), client.img2img(start, None, body)]
found.append(client.img2img(start, start.convert("L"), body))
files = [io.BytesIO() for _ in found]
for file, result in zip(files, found):
    assert result["info"].all_seeds == [5]
    result["images"][0].save(file, format="PNG")
print(json.dumps([base64.b64encode(file.getvalue()).decode() for file in files]))
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


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_ai_sdk_with_the_name_of_a_gpt_image_model(host, picture, tmp_path):
    (tmp_path / "sdk.mjs").write_text(AI_SDK)
    run(
        "npm", "install", "--silent", "--no-audit", "--no-fund", "ai@7", "@ai-sdk/openai@4",
        folder=tmp_path,
    )  # fmt: skip
    found = json.loads(run("node", "sdk.mjs", host.url("/v1"), str(picture), folder=tmp_path))
    assert [pixels(image).shape for image in found] == [(64, 64, 3)] * 2


def test_sd_backend_client(host, picture, tmp_path):
    run(sys.executable, "-m", "venv", "venv", folder=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "sd-backend-client==0.5.*", folder=tmp_path)
    made = run(python, "-c", BACKEND_CLIENT, host.url(""), str(picture), folder=tmp_path)
    found = json.loads(made.splitlines()[-1])
    body = {"prompt": "a red car", "seed": 5, "steps": 3, "cfg_scale": 5, "width": 64,
        "height": 64, "sampler_name": "Euler a"}  # fmt: skip
    answer = requests.post(host.url("/sdapi/v1/txt2img"), json=body, timeout=60).json()
    assert (pixels(found[0]) == pixels(answer["images"][0])).all()
    assert [pixels(image).shape for image in found] == [(64, 64, 3)] * 3


@pytest.mark.skipif(shutil.which("promtool") is None, reason="prometheus is not installed")
def test_prometheus_accepts_the_metrics(host, wanted):
    text = requests.get(host.url("/metrics"), timeout=20).text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
