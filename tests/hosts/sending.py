"""Jobs sent to a running host one by one, and the images that one rank makes of them without a
host.
"""

import base64
import io
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import requests
import torch
from PIL import Image

from backends.generation.pipeline import load_pipeline
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from tests.checkpoints import checkpoint
from tests.hosts.harness import RunningHost, wait_until

Body = Mapping[str, Any]
Facts = dict[str, Any]
BODY: Body = {
    "prompt": "a red car",
    "negative_prompt": "blurry",
    "num_inference_steps": 4,
    "seed": 5,
    "guidance_scale": 7.0,
}
WRONG: Body = {
    "denoising_end": 0.01,
    "scheduler": {"scheduler": "euler", "use_karras_sigmas": True},
}
"""What leaves no step, as the ranks alone can tell."""
ARGUMENTS = ("--type=sdxl", f"--checkpoint={checkpoint('sdxl')}", "--height=64", "--width=64")
"""The launcher's, for a host that makes the images of OneRank."""
NAMES = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}


class OneRank:
    """body -> its image by one pipeline in this process, [64, 64, 3] int; each is made once."""

    def __init__(self) -> None:
        load = LoadRequest(
            model_type="sdxl",
            checkpoint=str(checkpoint("sdxl")),
            variant="fp32",
            height=64,
            width=64,
        )
        self._pipeline = load_pipeline(read_table()["sdxl"], load, device=torch.device("cpu"))
        self._made: dict[str, np.ndarray] = {}

    def __call__(self, body: Body) -> np.ndarray:
        key = json.dumps(body, sort_keys=True)
        if key not in self._made:
            request = GenerateRequest(
                **{NAMES.get(name, name): value for name, value in body.items()}
            )
            self._made[key] = self._pipeline.generate(request).frames[0].astype(int)
        return self._made[key]


def session_from(client: str) -> requests.Session:
    """A session of one of several clients: on a host without a key, addresses tell them apart."""
    address = f"127.0.0.{2 + zlib.crc32(client.encode()) % 250}"
    made = requests.Session()
    made.trust_env = False
    made.adapters["http://"].poolmanager.connection_pool_kw["source_address"] = (address, 0)
    return made


def send(host: RunningHost, body: Body, client: str = "me") -> str:
    """The id of the job."""
    with session_from(client) as connection:
        answer = connection.post(host.url("/v1/jobs"), json=body, timeout=20)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def show(host: RunningHost, job: str) -> Facts:
    return host.get(f"/v1/jobs/{job}").json()


def begun(host: RunningHost, body: Body) -> str:
    """A job that is being worked on: what comes now waits."""
    job = send(host, body)
    wait_until(
        lambda: show(host, job)["state"] == "running", within_s=30, what="it runs", every_s=0.01
    )
    return job


def over(host: RunningHost, *jobs: str, within_s: float = 120) -> list[Facts]:
    for job in jobs:
        wait_until(
            lambda: show(host, job)["state"] in ("done", "failed", "cancelled"),
            within_s=within_s,
            what="it is over",
        )
    return [show(host, job) for job in jobs]


def both_run(host: RunningHost, jobs: list[str], *, within_s: float = 30) -> None:
    """Wait until two of the jobs run at the same time."""

    def two() -> bool:
        return sum(show(host, job)["state"] == "running" for job in jobs) == 2

    wait_until(two, within_s=within_s, what="two jobs run at once")


def follow(host: RunningHost, job: str, found: list[int]) -> None:
    """Add to `found` the step of each preview until the job is over."""
    with requests.get(
        host.url(f"/v1/jobs/{job}/events?previews=1"), stream=True, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and b'"image"' in line:
                found.append(json.loads(line[6:])["step"])


def pixels(host: RunningHost, job: str) -> np.ndarray:
    """Of a job that is done, [H, W, 3] int."""
    return from_file(host.get(f"/v1/jobs/{job}/result").content)


def from_file(data: bytes | str) -> np.ndarray:
    """data: an image file, or one in base64. [H, W, 3] int."""
    content = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest of any value."""
    return int(np.abs(one - other).max())
