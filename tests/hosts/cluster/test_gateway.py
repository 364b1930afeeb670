"""The gateway's HTTP side with two models and no replicas: which model a request reaches, and what
is refused before any does.
"""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from backends.model_table import read_table
from backends.request import GenerateResult
from hosts.cluster.config import plan_deployments
from hosts.cluster.deployment import Deployment
from hosts.cluster.gateway import create_gateway
from hosts.launch.settings import Settings
from hosts.supervision.host_state import Phase

KEY = "0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {KEY}"}


def deployments_of(**settings):
    both = {"fast": {"type": "sdxl", "max_steps": 10}, "fine": {"type": "sdxl", "max_steps": 50}}
    settings = Settings(engine="ray", deployments=both, api_key=KEY, **settings)
    return [
        Deployment(plan, store=None)
        for plan in plan_deployments(settings, read_table(), num_gpus=0)
    ]


@pytest.fixture
def deployments():
    return deployments_of()


@pytest.fixture
def client(deployments):
    client = create_gateway(deployments).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = HEADERS["Authorization"]
    return client


def waiting(deployments):
    return {
        deployment.name: [job.request.prompt for job in deployment.queue.jobs()]
        for deployment in deployments
    }


@pytest.mark.parametrize(
    ("path", "body", "reached"),
    [
        ("/v1/jobs", {"prompt": "a cat"}, "fast"),
        ("/v1/jobs", {"prompt": "a cat", "model": "fast"}, "fast"),
        ("/v1/jobs", {"prompt": "a cat", "model": "fine"}, "fine"),
        ("/v1/jobs?model=fine", {"prompt": "a cat"}, "fine"),
    ],
    ids=str,
)
def test_a_job_reaches_the_model_that_it_names_and_else_the_first(
    client, deployments, path, body, reached
):
    answer = client.post(path, json=body)
    assert answer.status_code == 202, answer.text
    assert waiting(deployments) == {"fast": [], "fine": []} | {reached: ["a cat"]}


def answered_at_once(deployments, client, request):
    """The answer, with the first job of any model done as soon as it waits."""
    latents = np.zeros((1, 4, 1, 1), np.float32)
    made = GenerateResult(
        frames=np.zeros((1, 8, 8, 3), np.uint8),
        latents=latents,
        seed=1,
        num_steps=1,
        exactness="exact",
        seconds=0.1,
    )
    for deployment in deployments:
        submit = deployment.queue.submit

        def submit_and_finish(*args, queue=deployment.queue, submit=submit, **kwargs):
            job = submit(*args, **kwargs)
            queue.finish(queue.next(), result=made)
            return job

        deployment.queue.submit = submit_and_finish
    return request(client)


PNG = io.BytesIO()
Image.new("RGB", (8, 8)).save(PNG, format="PNG")
DIALECTS = {
    "generate": lambda client: client.post(
        "/generate", json={"prompt": "x", "model": "fine", "num_inference_steps": 20}
    ),
    "openai": lambda client: client.post(
        "/v1/images/generations", json={"prompt": "x", "model": "fine", "num_inference_steps": 20}
    ),
    "openai form": lambda client: client.post(
        "/v1/images/edits",
        data={
            "prompt": "x",
            "model": "fine",
            "num_inference_steps": "20",
            "image": (io.BytesIO(PNG.getvalue()), "a.png"),
        },
    ),
    "a1111": lambda client: client.post(
        "/sdapi/v1/txt2img",
        json={
            "prompt": "x",
            "steps": 20,
            "override_settings": {"sd_model_checkpoint": "fine"},
        },
    ),
}


@pytest.mark.parametrize("request_", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_names_the_model_in_its_own_way(client, deployments, request_):
    """The other model would refuse 20 steps."""
    answer = answered_at_once(deployments, client, request_)
    assert answer.status_code == 200, answer.text


def test_what_a_model_refuses_is_answered_in_the_dialect_of_the_path(client):
    refused = client.post(
        "/v1/images/generations", json={"prompt": "x", "model": "fast", "num_inference_steps": 20}
    )
    assert (
        refused.status_code == 400
        and "more than this host allows: 10 (--max_steps)" in refused.json["error"]["message"]
    )


@pytest.mark.parametrize("path", ["/v1/jobs", "/generate", "/v1/images/generations"])
def test_a_model_that_is_not_there_is_refused_with_those_that_are(client, path):
    answer = client.post(path, json={"prompt": "x", "model": "other"})
    assert answer.status_code == 404
    message = (
        answer.json["error"]["message"] if path.startswith("/v1/images") else answer.json["message"]
    )
    assert message == "there is no model 'other'. Allowed: fast, fine."


def test_a_job_is_found_by_its_id_whatever_its_model(client, deployments):
    sent = [
        client.post("/v1/jobs", json={"prompt": "x", "model": name}).json["id"]
        for name in ("fine", "fast")
    ]
    assert [client.get(f"/v1/jobs/{job_id}").json["id"] for job_id in sent] == sent
    assert {job["id"] for job in client.get("/v1/jobs").json["jobs"]} == set(sent)
    assert client.delete(f"/v1/jobs/{sent[0]}").json["state"] == "cancelled"
    assert client.get("/v1/jobs/nobodys").status_code == 404


def test_models_are_listed_the_default_first(client):
    assert [model["id"] for model in client.get("/v1/models").json["data"]] == ["fast", "fine"]
    assert client.get("/v1/models/fine?model=fine").json["id"] == "fine"


def test_it_is_ready_when_every_model_is(client, deployments):
    assert client.get("/readyz").status_code == 503 and client.get("/initialize").status_code == 202
    deployments[0].state.become(Phase.READY)
    assert client.get("/readyz").status_code == 503
    deployments[1].state.become(Phase.READY)
    assert client.get("/readyz").status_code == 200 and client.get("/initialize").status_code == 200
    assert client.get("/livez").status_code == 200


def test_strangers_are_refused_before_their_body_is_read(client, deployments):
    bare = create_gateway(deployments).test_client()
    assert bare.get("/readyz").status_code == 503 and bare.get("/livez").status_code == 200
    for path in ("/cluster", "/metrics", "/v1/models", "/v1/jobs"):
        assert bare.get(path).status_code == 401, path
    assert bare.post("/v1/jobs", data=b"{", content_type="application/json").status_code == 401
    assert client.get("/cluster", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/cluster", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/v1/jobs", data=b"x", content_type="text/plain").status_code == 415


def test_a_body_that_is_too_large_is_refused_with_the_limit():
    client = create_gateway(deployments_of(max_body_mb=1)).test_client()
    body = json.dumps({"prompt": base64.b64encode(bytes(10**6)).decode()})
    answer = client.post("/v1/jobs", data=body, content_type="application/json", headers=HEADERS)
    assert (
        answer.status_code == 413
        and "larger than this host allows: 1 MB (--max_body_mb)" in answer.json["message"]
    )


def test_the_rate_of_a_client_is_counted_once_for_all_models():
    client = create_gateway(deployments_of(rate_limit=2)).test_client()
    sent = [
        client.post("/v1/jobs", json={"prompt": "x", "model": name}, headers=HEADERS).status_code
        for name in ("fast", "fine", "fast")
    ]
    assert sent == [202, 202, 429]


@pytest.mark.parametrize("content", [b"[" * 9000, b'{"model":' * 9000, b'{"a":1' + b"0" * 9000])
def test_json_that_cannot_be_read_is_the_clients_mistake(client, deployments, content):
    """The model that it names is looked for before the model's application reads it."""
    for path in ("/v1/jobs", "/generate", "/v1/images/generations", "/sdapi/v1/txt2img"):
        answer = client.post(path, data=content, content_type="application/json")
        assert answer.status_code == 400, (path, answer.text)
    assert waiting(deployments) == {"fast": [], "fine": []}


def test_only_the_operator_drains_a_replica(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice alice-0123456789ab")
    client = create_gateway(deployments_of(api_keys=str(keys))).test_client()
    found = [
        client.delete("/cluster/replicas/fast-9", headers={"Authorization": f"Bearer {key}"})
        for key in ("alice-0123456789ab", KEY)
    ]
    assert [answer.status_code for answer in found] == [403, 404]


def test_a_replica_that_is_not_there_cannot_be_drained(client):
    answer = client.delete("/cluster/replicas/fast-9")
    assert answer.status_code == 404 and answer.json["message"].startswith(
        "there is no replica 'fast-9'. Allowed: "
    )


def test_metrics_of_the_gateway_carry_the_model_and_a_name_of_their_own(client):
    client.post("/v1/jobs", json={"prompt": "x", "model": "fine"})
    lines = client.get("/metrics").text.splitlines()
    assert 'diffusion_gateway_jobs_waiting{model="fine"} 1.0' in lines
    assert 'diffusion_gateway_jobs_waiting{model="fast"} 0.0' in lines
    assert 'diffusion_gateway_replicas{model="fast",state="ready"} 0.0' in lines
