"""A request that goes through the gateway is, on the host, the request that the gateway read."""

import json

import numpy as np
import pytest
from PIL import Image

from backends import errors
from backends.generation.admission import AtLaunch
from backends.model_table import read_table
from backends.request import GenerateRequest
from hosts.cluster import messages
from hosts.http.decode import Accepted, decode_request
from hosts.http.errors import KINDS, error_of, status_of
from hosts.jobs.job import Job
from hosts.jobs.serialization import fingerprint
from hosts.jobs.trace import chrome_trace

RANDOM = np.random.default_rng(0)
IMAGE = Image.fromarray(RANDOM.integers(0, 256, (24, 16, 3), dtype=np.uint8), mode="RGB")
SPEC = next(
    spec for spec in read_table().values() if spec.returns_latents and "image" not in spec.requires
)
REQUESTS = {
    "plain": {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "seed": 7,
        "height": 64,
        "width": 72,
        "guidance_scale": 3.5,
        "strength": 0.4,
    },
    "numbers": {
        "sigmas": [1.5, 0.5, 0.0],
        "timesteps": [999, 500],
        "scheduler": {"scheduler": "euler"},
        "quality": "exact",
    },
    "images": {
        "init_image": IMAGE,
        "mask_image": IMAGE,
        "control_image": [IMAGE, IMAGE],
        "ip_adapter_image": IMAGE,
    },
    "arrays": {
        "latents": RANDOM.normal(size=(1, 4, 8, 8)).astype(np.float32),
        "prompt_embeds": RANDOM.normal(size=(1, 5, 8)).astype(np.float32),
        "pooled_prompt_embeds": RANDOM.normal(size=(1, 6)).astype(np.float32),
        "negative_prompt_embeds": RANDOM.normal(size=(1, 5, 8)).astype(np.float32),
        "negative_pooled_prompt_embeds": RANDOM.normal(size=(1, 6)).astype(np.float32),
    },
}


@pytest.mark.parametrize("values", REQUESTS.values(), ids=REQUESTS)
def test_a_host_reads_what_the_gateway_read(values):
    asked = GenerateRequest(**values)
    body = json.loads(json.dumps(messages.fields_of(asked)))
    assert body.pop("strict") is False
    accepted = Accepted(launch=AtLaunch(control_nets=2, ip_adapters=1))
    read = decode_request(body, spec=SPEC, accepted=accepted, is_strict=False)
    assert fingerprint(read) == fingerprint(asked)


@pytest.mark.parametrize("kind", sorted(KINDS.values(), key=str))
def test_an_error_of_a_replica_is_the_same_error_at_the_gateway(kind):
    said = error_of(status_of(kind("no")), "no")
    assert type(said) is kind and str(said) == "no"


def test_spans_survive_a_trace():
    job = Job(id="a", request=GenerateRequest(), started_s=105.0, created_s=100.0)
    job.spans = {
        0: [("encode", 105.0, 0.5), ("step", 105.5, 1.0), ("step", 106.5, 1.25)],
        1: [("step", 105.5, 0.75)],
    }
    assert messages.spans_of(chrome_trace(job)) == job.spans


def test_any_other_error_is_a_failure():
    assert type(error_of(500, "rank 0 failed")) is errors.HostError
