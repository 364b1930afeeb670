"""The application in front of those of several models: which one a request reaches, without ranks.
tests/hosts/ranks/test_models.py has a whole host.
"""

import pytest

from backends.model_table import read_table
from hosts.compat.protocol import FixedModel
from hosts.http.app import Host
from hosts.jobs.store import JobStore, NoStore
from hosts.launch.settings import Settings
from tests.hosts.application import answer_jobs

TYPES = {"quick": "sdxl", "movie": "svd", "fine": "sd1"}
KEY = "0123456789abcdef"


def client_of(queue, state, store=None, **settings):
    protocol = FixedModel()
    hosts = [
        Host(
            settings=Settings.from_values({"type": kind, **settings}),
            spec=read_table()[kind],
            queue=queue,
            state=state,
            protocol=protocol,
            name=name,
        )
        for name, kind in TYPES.items()
    ]
    return protocol.application(hosts, store or NoStore()).test_client()


@pytest.fixture
def client(queue, state):
    return client_of(queue, state)


def waiting(queue):
    return [job.request.model for job in queue.jobs()]


@pytest.mark.parametrize(
    ("path", "named", "reached"),
    [
        ("/v1/jobs", {}, "quick"),
        ("/v1/jobs", {"model": "fine"}, "fine"),
        ("/v1/jobs?model=fine", {}, "fine"),
        ("/v1/jobs", {"model": "quick"}, "quick"),
    ],
)
def test_a_job_is_for_the_model_that_it_names_and_else_for_the_first(
    client, queue, path, named, reached
):
    answer = client.post(path, json={"prompt": "a cat", **named})
    assert answer.status_code == 202, answer.text
    assert waiting(queue) == [reached]
    assert (answer.json["model"], answer.json["type"]) == (reached, TYPES[reached])


def test_each_model_reads_a_request_by_its_own_rules(client, queue):
    refused = client.post("/v1/jobs", json={"prompt": "x", "model": "quick", "num_frames": 4})
    assert refused.status_code == 422 and "makes one image" in refused.json["message"]
    videos = client.post("/v1/images/generations", json={"prompt": "x", "model": "movie"})
    assert videos.status_code == 422 and "generates videos" in videos.json["error"]["message"]
    fields = client.get("/openapi.json?model=movie").json["components"]["schemas"]["Request"]
    assert "num_frames" in fields["properties"]
    assert queue.jobs() == []


def test_a_job_is_shown_and_its_file_is_of_its_own_models_kind(client, queue):
    job = client.post("/v1/jobs", json={"prompt": "x", "model": "fine"}).json
    assert client.get(job["links"]["self"]).json["type"] == "sd1"
    listed = client.get("/v1/jobs").json["jobs"]
    assert [(one["model"], one["type"]) for one in listed] == [("fine", "sd1")]
    assert client.get("/v1/videos?model=movie").json["data"] == []


def test_every_list_has_every_model(client):
    names = list(TYPES)
    assert [one["id"] for one in client.get("/v1/models").json["data"]] == names
    assert [one["title"] for one in client.get("/sdapi/v1/sd-models").json] == names
    assert client.get("/v1/models/movie").json["id"] == "movie"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/openapi.json").json["components"]["schemas"]["Request"]["properties"][
        "model"
    ]["enum"] == [*names, None]


def test_a1111s_options_choose_the_model_of_its_own_api_only(client, queue):
    answer_jobs(queue)
    chosen = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "fine"})
    assert chosen.status_code == 200, chosen.text
    assert client.get("/sdapi/v1/options").json["sd_model_checkpoint"] == "fine"
    assert client.post("/sdapi/v1/txt2img", json={"prompt": "x"}).status_code == 200
    overridden = {"prompt": "x", "override_settings": {"sd_model_checkpoint": "quick"}}
    assert (
        '"sd_model_name": "quick"' in client.post("/sdapi/v1/txt2img", json=overridden).json["info"]
    )
    assert client.get("/sdapi/v1/options").json["sd_model_checkpoint"] == "fine"
    assert client.post("/v1/jobs", json={"prompt": "x"}).json["model"] == "quick"


def test_a_refused_option_chooses_nothing(client):
    body = {"sd_model_checkpoint": "fine", "sd_vae": "other.safetensors"}
    assert client.post("/sdapi/v1/options", json=body).status_code == 422
    assert client.get("/sdapi/v1/options").json["sd_model_checkpoint"] == "quick"


def test_the_choice_outlives_the_process_and_a_model_that_is_gone_is_not_chosen(
    queue, state, tmp_path
):
    store = JobStore(tmp_path)
    client_of(queue, state, store).post("/sdapi/v1/options", json={"sd_model_checkpoint": "fine"})
    store.close()
    store = JobStore(tmp_path)
    again = client_of(queue, state, store)
    assert again.get("/sdapi/v1/options").json["sd_model_checkpoint"] == "fine"
    store.remember("model", "removed")
    assert again.get("/sdapi/v1/options").json["sd_model_checkpoint"] == "quick"
    store.close()


def test_the_key_is_asked_for_before_a_model_is_looked_up(queue, state):
    client = client_of(queue, state, api_key=KEY)
    refused = client.post("/v1/jobs", json={"prompt": "x", "model": "other"})
    assert refused.status_code == 401
    key = {"Authorization": f"Bearer {KEY}"}
    missing = client.post("/v1/jobs", json={"prompt": "x", "model": "other"}, headers=key)
    assert missing.status_code == 404
    assert missing.json["message"] == "there is no model 'other'. Allowed: quick, movie, fine."


def test_the_figures_of_all_models_are_one_hosts(client, queue):
    answer_jobs(queue)
    for name in ("quick", "fine"):
        client.post("/sdapi/v1/txt2img", json={"prompt": "x", "override_settings": {
            "sd_model_checkpoint": name}})  # fmt: skip
    text = client.get("/metrics").text
    line = next(line for line in text.splitlines() if 'status="done"' in line or "done" in line)
    assert line.endswith(" 2") or line.endswith(" 2.0"), line
