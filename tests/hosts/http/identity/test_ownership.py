"""Whose jobs a client sees, follows and cancels where clients have keys of their own."""

import logging
import re
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.model_table import read_table
from backends.request import GenerateRequest
from hosts.http.identity.keys import Key
from hosts.jobs.job import JobStatus
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from tests.hosts.application import answer_jobs, make_client
from tests.hosts.cluster.test_gateway import deployments_of
from tests.hosts.jobs.stored import result

ALICE, BOB, OPERATOR = "alice-0123456789ab", "bob-0123456789abcd", "operator-0123456789"
FILE = f"# who may ask\nalice {ALICE}\n\nbob {BOB}  \n"
PATHS = ("/v1/jobs/{}", "/v1/jobs/{}/result", "/v1/jobs/{}/events", "/v1/jobs/{}/trace")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(FILE)
    return str(path)


@pytest.fixture
def client(queue, state, keys):
    return make_client(queue, state, api_key=OPERATOR, api_keys=keys)


def send(client, key, prompt="a", **headers):
    answer = client.post("/v1/jobs", json={"prompt": prompt}, headers=bearer(key) | headers)
    assert answer.status_code == 202, answer.text
    return answer.get_json()["id"]


def listed(client, key):
    jobs = client.get("/v1/jobs", headers=bearer(key)).get_json()["jobs"]
    return [job["id"] for job in jobs]


def routes_of_one_job(app):
    """Every route of every dialect that names a job, with its methods."""
    found = []
    for rule in app.url_map.iter_rules():
        if "job_id" in rule.arguments:
            path = re.sub(r"<[^>]*job_id>", "{}", rule.rule)
            found += [(path, method) for method in rule.methods - {"HEAD", "OPTIONS"}]
    return sorted(found)


@pytest.mark.parametrize("model_type", ["sdxl", "ad"])
def test_a_job_of_another_key_looks_like_no_job_on_every_route(model_type, queue, state, keys):
    client = make_client(queue, state, api_key=OPERATOR, api_keys=keys, type=model_type)
    routes = routes_of_one_job(client.application)
    assert {path for path, _ in routes} >= {*PATHS, "/v1/videos/{}", "/v1/videos/{}/content"}
    job_id = send(client, ALICE)
    for path, method in routes:
        body = {} if method == "GET" else {"json": {"prompt": "b"}}
        unknown, others = "0" * len(job_id), []
        for key in (BOB, OPERATOR):
            answer = client.open(path.format(job_id), method=method, headers=bearer(key), **body)
            others.append((answer.status_code, answer.text.replace(job_id, unknown)))
        none = client.open(path.format(unknown), method=method, headers=bearer(BOB), **body)
        assert others == [(404, none.text)] * 2, (path, method)
    assert queue.find(job_id).status is JobStatus.QUEUED
    assert client.get(f"/v1/jobs/{job_id}", headers=bearer(ALICE)).status_code == 200
    assert client.delete(f"/v1/jobs/{job_id}", headers=bearer(ALICE)).status_code == 202


def test_lists_show_a_clients_own_jobs_only(queue, state, keys):
    client = make_client(queue, state, api_key=OPERATOR, api_keys=keys, type="ad")
    made = {key: send(client, key) for key in (ALICE, BOB, OPERATOR)}
    assert {key: listed(client, key) for key in made} == {key: [made[key]] for key in made}
    videos = client.get("/v1/videos", headers=bearer(BOB)).get_json()["data"]
    assert [video["id"] for video in videos] == [made[BOB]]


def test_the_operator_may_let_all_keys_share_their_jobs(queue, state, keys):
    client = make_client(queue, state, api_keys=keys, share_jobs=True)
    job_id = send(client, ALICE)
    assert listed(client, BOB) == [job_id]
    assert client.delete(f"/v1/jobs/{job_id}", headers=bearer(BOB)).status_code == 202
    assert queue.find(job_id).status is JobStatus.CANCELLED
    with pytest.raises(ConfigError, match="--share_jobs was given, but without --api_keys"):
        plan_start(Settings(type="sdxl", share_jobs=True), read_table(), num_gpus=0)


def test_progress_preview_and_interrupt_are_of_the_senders_running_job(client, queue):
    job = queue.find(send(client, ALICE))
    assert queue.next() is job
    queue.record_step(job, 1, 4, preview=result().frames[0])
    seen = {
        key: client.get("/sdapi/v1/progress", headers=bearer(key)).get_json()
        for key in (ALICE, BOB)
    }
    assert (seen[ALICE]["state"]["job"], seen[ALICE]["progress"]) == (job.id, 0.25)
    assert seen[ALICE]["current_image"] is not None
    assert (seen[BOB]["state"]["job"], seen[BOB]["progress"]) == ("", 0)
    assert seen[BOB]["current_image"] is None
    assert [client.get("/progress", headers=bearer(key)).text for key in seen] == ["25", "0"]
    for name in ("interrupt", "skip"):
        assert client.post(f"/sdapi/v1/{name}", headers=bearer(BOB)).status_code == 200
    assert not job.ends_early
    client.post("/sdapi/v1/interrupt", headers=bearer(ALICE))
    assert job.ends_early
    queue.finish(job, result=result())
    assert [client.get("/progress", headers=bearer(key)).text for key in seen] == ["100", "0"]


def test_a_key_of_the_file_is_one_client_at_any_address(queue, state, keys):
    client = make_client(queue, state, api_keys=keys, rate_limit=2)

    def ask(key, address):
        return client.post(
            "/v1/jobs",
            json={"prompt": "a"},
            headers=bearer(key) | {"Idempotency-Key": address},
            environ_overrides={"REMOTE_ADDR": address},
        ).status_code

    assert [ask(ALICE, f"10.0.0.{n}") for n in range(3)] == [202, 202, 429]
    assert ask(BOB, "10.0.0.0") == 202
    assert len({job.client for job in queue.jobs()}) == 2 and queue.num_waiting == 3


def test_a_link_shows_the_job_of_the_key_that_got_it_until_the_key_is_gone(client, queue, keys):
    answer_jobs(queue)
    answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers=bearer(ALICE))
    path = answer.get_json()["data"][0]["url"].removeprefix("http://localhost")
    assert client.get(path).status_code == 200
    assert client.get(path.replace("key=alice", "key=bob")).status_code == 401
    assert client.get(path.replace("key=alice&", "")).status_code == 401
    Path(keys).write_text(f"bob {BOB}\n")
    assert client.get(path).status_code == 401


def test_keys_are_read_again_when_their_file_changes_and_a_wrong_file_changes_nothing(
    client, keys, caplog
):
    caplog.set_level(logging.INFO)
    new = "carol-0123456789abc"
    Path(keys).write_text(f"alice {ALICE}\ncarol {new}\n")
    status = {key: client.get("/v1/jobs", headers=bearer(key)).status_code for key in (ALICE, new)}
    assert set(status.values()) == {200}
    assert client.get("/v1/jobs", headers=bearer(BOB)).status_code == 401
    assert "was read again: alice, carol" in caplog.text
    for text in (f"alice {ALICE}\nmallory short\n", "", "alice", f"alice {ALICE} more\n"):
        Path(keys).write_text(text)
        assert client.get("/v1/jobs", headers=bearer(new)).status_code == 200, text
    Path(keys).unlink()
    assert client.get("/v1/jobs", headers=bearer(new)).status_code == 200
    assert caplog.text.count("keeps its last keys") == 5
    assert not [key for key in (ALICE, BOB, new, OPERATOR, "short") if key in caplog.text]


def test_only_the_operators_key_may_change_the_host_for_all(client, queue, state, keys):
    measured = []
    state.measure, state.facts = lambda: measured.append(1), {"planner": {}}
    refused = client.post("/measure", json={}, headers=bearer(ALICE))
    assert refused.status_code == 403 and "--api_key" in refused.text and measured == []
    assert client.post("/measure", json={}, headers=bearer(OPERATOR)).status_code == 200
    alone = make_client(queue, state, api_key=OPERATOR)
    assert alone.post("/measure", json={}, headers=bearer(OPERATOR)).status_code == 200


def test_the_gateway_lists_and_finds_a_clients_own_jobs_only(keys):
    from hosts.cluster.gateway import create_gateway

    gateway = create_gateway(deployments_of(api_keys=keys)).test_client()
    made = {}
    for key, model in ((ALICE, "fast"), (ALICE, "fine"), (BOB, "fine")):
        body = {"prompt": "a", "model": model}
        answer = gateway.post("/v1/jobs", json=body, headers=bearer(key))
        made.setdefault(key, []).append(answer.get_json()["id"])
    assert {key: listed(gateway, key) for key in made} == made
    for path in PATHS:
        answer = gateway.get(path.format(made[ALICE][1]), headers=bearer(BOB))
        assert answer.status_code == 404
    drain = gateway.delete("/cluster/replicas/fast-1", headers=bearer(BOB))
    assert drain.status_code == 403


def test_the_store_keeps_the_owner_and_not_the_key(open_queue, state, keys, tmp_path):
    arguments = {"api_key": OPERATOR, "api_keys": keys}
    job_id = send(make_client(open_queue(), state, **arguments), ALICE)
    client = make_client(open_queue(), state, **arguments)
    assert listed(client, ALICE) == [job_id] and listed(client, BOB) == []
    stored = b"".join(path.read_bytes() for path in (tmp_path / "state").glob("jobs.sqlite*"))
    assert ALICE.encode() not in stored
    assert Key(name="", secret=ALICE).owner.encode() in stored


def test_jobs_without_an_owner_are_nobodys_once_clients_have_keys(open_queue, state, keys):
    job_id = open_queue().submit(GenerateRequest(prompt="a"), is_stored=True).id
    client = make_client(open_queue(), state, api_key=OPERATOR, api_keys=keys)
    assert (listed(client, ALICE), listed(client, OPERATOR)) == ([], [])
    assert listed(make_client(open_queue(), state, api_key=OPERATOR), OPERATOR) == [job_id]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alice", "line 1 is not of this form"),
        (f"alice {ALICE} x", "line 1 is not of this form"),
        (f"al/ice {ALICE}", "letters, digits and ._- only"),
        (f"alice {ALICE}\n\nbob 123", "line 3: a key of at least 16 characters"),
        (f"alice {ALICE}\nalice {BOB}", "line 2 repeats a name or a key"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2 repeats a name or a key"),
        ("alice @/etc/passwd", "line 1 is not of this form"),
        ("# nobody\n", "it has no such line"),
        (b"\xff\xfe", "it cannot be read"),
        (None, "it cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_at_start_without_showing_a_key(text, said, tmp_path):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        Settings.from_values({"api_keys": str(path)})
    assert ALICE not in str(caught.value) and str(path) in str(caught.value)


def test_ids_are_unguessable(queue):
    ids = [queue.submit(GenerateRequest(prompt="a")).id for _ in range(20)]
    assert len({*ids}) == 20 and all(re.fullmatch(r"[0-9a-f]{24}", each) for each in ids)
    common = [sum(one[n] == other[n] for n in range(24)) for one in ids for other in ids]
    assert sum(count == 24 for count in common) == 20  # no id shares a beginning with the others
    assert max(count for count in common if count < 24) < 12
