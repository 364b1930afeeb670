"""Hostile and senseless requests against a real host: an answer in time, never a 5xx but 503, and
the next image is right.

FUZZ_EXAMPLES sets the number of bodies for /generate (default 120), FUZZ_SCHEMA_EXAMPLES of
requests for each operation of /openapi.json (default 8).
"""

import base64
import io
import json
import os
import pickle
import random
import time

import numpy as np
import pytest
import requests
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hosts.compat.fields import NAMES
from tests.checkpoints import checkpoint
from tests.hosts.bodies import SIDE, conditioning, tensor
from tests.hosts.client import FOUR_KEYS, decode, encode
from tests.hosts.compat.forge import Calls, forged_tensor
from tests.hosts.harness import wait_until
from tests.hosts.http.raw_bytes import hostile_bytes, is_a_failure, status_of
from tests.hosts.inprocess import InProcessHost

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "120"))
SCHEMA_EXAMPLES = int(os.environ.get("FUZZ_SCHEMA_EXAMPLES", "8"))
LONGEST_S = 30.0
BODY = {"positive": "a red car", "steps": 2, "seed": 5, "cfg": 7.0}
ALLOWED = {200, 202, 400, 404, 405, 409, 411, 413, 415, 422, 429, 503}
fuzz = settings(
    max_examples=EXAMPLES,
    database=None,  # the suite leaves nothing behind
    deadline=None,  # measured below
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def host():
    """Small bounds, so that no request that is allowed takes long."""
    with InProcessHost(
        type="sdxl",
        checkpoint=str(checkpoint("sdxl")),
        max_steps=3,
        max_side=128,
        max_prompt_chars=500,
        max_body_mb=2,
        queue_size=48,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def reference(host):
    return np.asarray(decode(host.generate_image(BODY)["output"]))


def file_of(kind, side=16):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (9, 80, 200)).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


HONEST = [
    tensor(1, 4, SIDE // 8, SIDE // 8),
    tensor(1, 4, 3, 5),
    tensor(2, 4, 8, 8),
    tensor(1, 16, 8, 8),
    tensor(4, 8),
    tensor(1, 77, 32),
    encode(torch.tensor([14.6, 7.0, 3.0, 0.0])),
    encode(torch.tensor([1, 2])),
    encode(torch.full((1, 4, 8, 8), float("nan"))),
    encode(torch.zeros(1, 4, 8, 8, dtype=torch.float64)),
    encode(np.zeros(3)),
    encode(Image.new("RGB", (16, 16))),
    encode(Image.new("RGBA", (1, 200))),
    encode([1, {}]),
    file_of("PNG"),
    file_of("JPEG"),
    file_of("WEBP"),
    file_of("BMP"),
    file_of("PNG", 1),
    file_of("PNG", 600),
    "data:image/png;base64," + file_of("PNG"),
]
HOSTILE = [
    encode(Calls(os.system, "true")),
    encode(Calls(eval, "1")),
    encode(Calls(os.getpid)),
    encode(forged_tensor(size=(2**40,))),
    encode(forged_tensor(offset=10**9)),
    encode(forged_tensor(stride=(0, 0), size=(10**5, 10**5))),
    base64.b64encode(b"\x80\x04" + b"(" * 5000).decode(),
    base64.b64encode(pickle.dumps("x" * 1000)[:-5]).decode(),
    "/etc/passwd",
    "/proc/self/mem",
    "../../x",
    "data:text/html;base64,AAAA",
    "AAAA",
    "%%%",
    "A" * 5000,
]
FIELDS = sorted(
    {name for names in NAMES.values() for name in names}
    | {
        "latent",
        "sigmas",
        "timesteps",
        "positive_embeds",
        "negative_embeds",
        "image",
        "init_image",
        "mask_image",
        "control_image",
        "ip_image",
    }
    | {"image_scale", "init_image_scale", "lora", "keep", "unheard_of"}
)
numbers = st.one_of(
    st.integers(-3, 200),
    st.integers(),
    st.floats(),
    st.sampled_from([0, -0.0, 1e308, 2**31, 2**63, 2**64, 8, 64, 65, 1.5, True]),
)
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "euler",
            "dpmpp_2m",
            "ddim",
            "lcm",
            "",
            "exact",
            "a" * 501,
            "\x00",
            "\ud83d\ude00 cat",
            "7",
        ]
    ),
)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
schedulers = st.dictionaries(
    st.sampled_from(
        [
            "scheduler",
            "use_karras_sigmas",
            "timestep_spacing",
            "algorithm_type",
            "beta_start",
            "num_train_timesteps",
            "order",
            "x",
        ]
    ),
    st.one_of(
        plain,
        st.sampled_from(["euler", "dpmpp_2m", "heun", "unipc", "trailing", "sde-dpmsolver++"]),
    ),
    max_size=4,
)
broken = st.builds(
    lambda text, at, byte: text[: at % (len(text) + 1)] + byte + text[at % (len(text) + 1) + 1 :],
    st.sampled_from(HONEST),
    st.integers(0, 10**6),
    st.sampled_from(["", "A", "/", "=", "\n"]),
)
values = st.one_of(
    anything,
    anything,
    st.sampled_from(HONEST),
    st.sampled_from(HOSTILE),
    broken,
    schedulers,
    st.lists(st.sampled_from(HONEST + HOSTILE), max_size=3),
    st.lists(st.floats(0, 1000), max_size=5),
    st.lists(st.integers(0, 999), max_size=5),
    st.just("CONDITIONING"),
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6)


def ask(host, path="/generate", **kwargs):
    """The answer, which must come in time, be none of the host's failures, and say what is
    wrong.
    """
    started = time.monotonic()
    answer = requests.post(host.url(path), timeout=LONGEST_S, **kwargs)
    assert time.monotonic() - started < LONGEST_S
    assert answer.status_code in ALLOWED, (answer.status_code, answer.text[:500])
    if answer.status_code != 200 and answer.status_code != 202:
        body = answer.json()
        assert set(body) == FOUR_KEYS and body["message"] and body["output"] is None, body
    return answer


def assert_draws(host, reference):
    assert (np.asarray(decode(host.generate_image(BODY)["output"])) == reference).all(), (
        "the image after it is another one"
    )


@fuzz
@given(given=bodies)
def test_no_body_breaks_the_host(host, reference, given):
    body = {
        **BODY,
        **{
            name: conditioning("sdxl", 1) if value == "CONDITIONING" else value
            for name, value in given.items()
        },
    }
    answer = ask(host, data=json.dumps(body), headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        assert answer.json()["message"] == "OK"


@fuzz
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda cut: json.dumps({**BODY, "latent": HONEST[0]}).encode()[: -cut or None],
            st.integers(0, 4000),
        ),
        st.builds(
            lambda text, encoding: json.dumps(
                {"positive": text, "steps": 1}, ensure_ascii=False
            ).encode(encoding, "ignore"),
            st.text(max_size=20),
            st.sampled_from(["utf-8", "utf-16", "utf-32", "latin-1", "utf-7", "utf-8-sig"]),
        ),
        st.builds(lambda depth: b"[" * depth, st.integers(1, 200_000)),
        st.builds(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth, st.integers(1, 50_000)),
        st.just(b'{"steps": ' + b"9" * 10_000 + b"}"),
    ),
    content_type=st.sampled_from(
        ["application/json"] * 6
        + ["text/plain", "application/json; charset=utf-16", "multipart/form-data; boundary=x", ""]
    ),
    encoding=st.sampled_from([None, None, "gzip", "br", "identity"]),
    path=st.sampled_from(["/generate", "/generate", "/v1/jobs"]),
)
def test_no_bytes_break_the_host(host, reference, data, content_type, encoding, path):
    headers = {"Content-Type": content_type} | ({"Content-Encoding": encoding} if encoding else {})
    ask(host, path, data=data, headers=headers)


def test_no_bytes_at_the_socket_break_the_host(host, reference, caplog):
    """Seed and number as `python -m benchmarks.hostile --kind=raw` has them, but fewer."""
    chance = random.Random(1)
    for _ in range(EXAMPLES * 3):
        data, waits = hostile_bytes(chance), chance.random() < 0.9
        status = status_of(host.port, data, waits=waits)
        assert not is_a_failure(status), (status, data)
    assert "Traceback" not in caplog.text


def test_every_operation_of_the_schema_holds_what_it_promises(host, reference):
    document = requests.get(host.url("/openapi.json"), timeout=20).json()
    schema = schemathesis.openapi.from_dict(document)
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 14

    def check(operation):
        @settings(parent=fuzz, max_examples=SCHEMA_EXAMPLES)
        @given(case=operation.as_strategy())
        def run(case):
            answer = case.call(base_url=host.url(""), timeout=LONGEST_S)
            if answer.status_code != 503:
                case.validate_response(answer, checks=checks)

        run()

    for operation in operations:
        check(operation)


def test_the_host_is_as_it_was(host, reference):
    """After all of the above: nothing waits, the loop lives, and the image is the same."""
    wait_until(
        lambda: host.queue.num_waiting == 0 and not host.queue._running,
        within_s=60,
        what="the queue is empty",
    )
    assert_draws(host, reference)
