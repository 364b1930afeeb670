"""/v1/jobs over a real socket and a real rank loop: send, follow, fetch, cancel, and clients that
go away.
"""

import base64
import io
import itertools
import json
import socket

import numpy as np
import pytest
import requests
from PIL import Image

from hosts.http import jobs_api
from hosts.jobs.queue import JobStatus
from tests.checkpoints import checkpoint
from tests.hosts.client import assert_is_error, decode
from tests.hosts.harness import wait_until
from tests.hosts.inprocess import InProcessHost
from tests.hosts.sending import session_from

BODY = {"prompt": "a red car", "seed": 5, "num_inference_steps": 4, "guidance_scale": 7.0}
LONG = {**BODY, "num_inference_steps": 900}


@pytest.fixture(scope="module")
def host():
    with InProcessHost(
        type="sdxl", checkpoint=str(checkpoint("sdxl")), disconnect_grace="1"
    ) as running:
        yield running


def send(host, body, **kwargs):
    answer = requests.post(host.url("/v1/jobs"), json=body, timeout=20, **kwargs)
    assert answer.status_code == 202, answer.text
    return answer.json()


def state(host, job_id):
    return requests.get(host.url(f"/v1/jobs/{job_id}"), timeout=20).json()


def wait_for(host, job_id, *states):
    wait_until(
        lambda: state(host, job_id)["state"] in states, within_s=60, what=f"{job_id} is {states}"
    )
    return state(host, job_id)


def cancel(host, job_id):
    return requests.delete(host.url(f"/v1/jobs/{job_id}"), timeout=20)


def test_job_is_accepted_followed_and_fetched_as_what_generate_gives(host):
    sent = send(host, BODY)
    assert sent["state"] in ("queued", "running") and sent["seed"] == 5
    done = wait_for(host, sent["id"], "done")
    assert (done["step"], done["steps"], done["error"], done["exactness"]) == (4, 4, None, "exact")
    assert (done["type"], done["backend"], done["ranks"], done["position"], done["attempts"]) == (
        "sdxl",
        "single",
        1,
        0,
        1,
    )
    schema = requests.get(host.url("/openapi.json"), timeout=20).json()["components"]["schemas"][
        "Job"
    ]
    assert set(schema["properties"]) == set(schema["required"]) == set(done)
    assert (
        done["settings"]["height"],
        done["settings"]["num_inference_steps"],
        done["settings"]["prompt"],
    ) == (64, 4, "a red car")
    png = requests.get(host.url(done["links"]["result"]), timeout=20)
    assert (png.headers["Content-Type"], png.headers["X-Seed"]) == ("image/png", "5")
    sample_image = Image.open(io.BytesIO(png.content))
    assert json.loads(sample_image.text["parameters"])["prompt"] == "a red car"
    as_json = requests.get(
        host.url(done["links"]["result"]), headers={"Accept": "application/json"}, timeout=20
    ).json()
    in_json = Image.open(io.BytesIO(base64.b64decode(as_json["output"])))
    at_once = host.generate_image({"positive": "a red car", "seed": 5, "steps": 4, "cfg": 7.0})
    for image in (in_json, decode(at_once["output"])):
        assert np.array_equal(np.asarray(image), np.asarray(sample_image))
    latents = np.load(io.BytesIO(base64.b64decode(as_json["latents"])), allow_pickle=False)
    assert latents.shape == (1, 4, 8, 8) and as_json["content_type"] == "image/png"
    assert (
        requests.get(
            host.url(done["links"]["result"]), headers={"Accept": "video/mp4"}, timeout=20
        ).status_code
        == 400
    )


def test_events_show_every_stage_and_previews_grow_into_the_image(host):
    sent = send(host, {**BODY, "num_inference_steps": 12})
    states, previews = [], []
    with requests.get(
        host.url(sent["links"]["events"] + "?previews=1"), stream=True, timeout=60
    ) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        name = None
        for line in stream.iter_lines(decode_unicode=True):
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                (states if name == "status" else previews).append(json.loads(line[6:]))
    assert states[-1]["state"] == "done" and states[-1]["step"] == 12
    assert previews and all(
        a["step"] < b["step"] for a, b in zip(previews, previews[1:], strict=False)
    )
    header, _, data = previews[-1]["image"].partition(",")
    assert header == "data:image/jpeg;base64"
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert small.size == (256, 256) and np.asarray(small).std() > 5


def test_nobody_looking_means_no_previews_are_made(host):
    sent = send(host, BODY)
    wait_for(host, sent["id"], "done")
    assert host.queue.find(sent["id"]).preview is None


def test_running_job_is_cancelled_within_two_steps_and_the_next_is_right(host):
    wanted = host.generate_image({**BODY})["output"]
    sent = send(host, LONG)
    wait_until(lambda: state(host, sent["id"])["step"] > 2, within_s=60, what="it runs")
    at = cancel(host, sent["id"]).json()["step"]
    ended = wait_for(host, sent["id"], "cancelled")
    assert ended["step"] <= at + 2
    assert host.generate_image({**BODY})["output"] == wanted
    answer = requests.get(host.url(ended["links"]["result"]), timeout=20)
    assert answer.status_code == 409 and "cancelled" in assert_is_error(answer.json())


def test_error_of_a_job_holds_nothing_of_its_run(host):
    """Its frames would keep latents and activations for as long as the job is kept."""
    sent = send(host, LONG)
    wait_until(lambda: state(host, sent["id"])["step"] > 2, within_s=60, what="it runs")
    cancel(host, sent["id"])
    wait_for(host, sent["id"], "cancelled")
    error = host.queue.find(sent["id"], owner=None).error
    assert error is not None
    while error is not None:
        assert error.__traceback__ is None
        error = error.__cause__ or error.__context__


def test_queued_job_waits_in_its_place_and_is_cancelled_at_once(host):
    running = send(host, LONG)
    wait_for(host, running["id"], "running")
    waiting = [send(host, BODY) for _ in range(2)]
    assert [state(host, job["id"])["position"] for job in waiting] == [1, 2]
    assert requests.get(host.url(waiting[0]["links"]["result"]), timeout=20).status_code == 409
    assert cancel(host, waiting[0]["id"]).json()["state"] == "cancelled"
    assert state(host, waiting[1]["id"])["position"] == 1
    listed = requests.get(host.url("/v1/jobs"), timeout=20).json()["jobs"]
    assert [job["id"] for job in listed[:2]] == [running["id"], waiting[1]["id"]]
    assert not any("prompt" in json.dumps(job) for job in listed)
    cancel(host, running["id"])
    assert wait_for(host, waiting[1]["id"], "done")["step"] == 4


def test_clients_take_turns(host):
    running = send(host, LONG)
    wait_for(host, running["id"], "running")
    greedy = [send(host, BODY)["id"] for _ in range(3)]
    with session_from("modest") as modest_client:
        modest = modest_client.post(host.url("/v1/jobs"), json=BODY, timeout=20).json()["id"]
    listed = [job["id"] for job in requests.get(host.url("/v1/jobs"), timeout=20).json()["jobs"]]
    assert listed[1:5] == [greedy[0], modest, greedy[1], greedy[2]]
    cancel(host, running["id"])
    for job_id in (*greedy, modest):
        wait_for(host, job_id, "done")
    ended = {job_id: host.queue.find(job_id).ended_s for job_id in (*greedy, modest)}
    assert sorted(ended, key=ended.get) == [greedy[0], modest, greedy[1], greedy[2]]


def test_job_of_a_client_that_went_away_is_cancelled_and_a_kept_one_is_not(host):
    for body, ended in (
        (LONG, JobStatus.CANCELLED),
        ({**BODY, "num_inference_steps": 150, "keep": True}, JobStatus.DONE),
    ):
        data = json.dumps(body).encode()
        head = (
            "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", host.port)) as connection:
            connection.sendall(head.encode() + data)
            wait_until(
                lambda: (job := host.queue.jobs()[0]).status is JobStatus.RUNNING and job.step > 0,
                within_s=60,
                what="it runs",
            )
            job = host.queue.jobs()[0]
        assert job.finished.wait(60)
        assert job.status is ended
        assert ended is JobStatus.DONE or "the client went away" in str(job.error)


def test_client_that_waits_long_is_answered(host):
    """Longer than the host looks for the client's end of the connection."""
    assert host.generate_image({**BODY, "num_inference_steps": 150})["message"] == "OK"


def test_unknown_job_is_answered_as_an_error(host):
    for method, path in (("get", ""), ("delete", ""), ("get", "/result"), ("get", "/events")):
        answer = getattr(requests, method)(host.url(f"/v1/jobs/none{path}"), timeout=20)
        assert answer.status_code == 404
        assert "there is no job 'none'" in assert_is_error(answer.json())


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/jobs?limt=5", "'limt' is not a parameter of /v1/jobs. It takes none."),
        ("/v1/jobs?limit=5", "'limit' is not a parameter"),
        ("/v1/jobs/{id}?verbose=1", "'verbose' is not a parameter"),
        ("/v1/jobs/{id}/result?imge=1", "The nearest one is image"),
        ("/v1/jobs/{id}/result?image=0&image=1", "image is given 2 times"),
        ("/v1/jobs/{id}/events?preview=1", "The nearest one is previews"),
        ("/v1/jobs/{id}/trace?format=json", "'format' is not a parameter"),
    ],
)
def test_parameters_that_a_route_does_not_read_are_refused(host, path, said):
    done = wait_for(host, send(host, BODY)["id"], "done") if "{id}" in path else {"id": ""}
    answer = requests.get(host.url(path.format(id=done["id"])), timeout=20)
    assert answer.status_code == 400 and said in assert_is_error(answer.json())


def test_parameters_against_caches_are_accepted(host):
    assert requests.get(host.url("/v1/jobs?_=1764554400"), timeout=20).status_code == 200


def test_bad_field_is_refused_before_the_queue(host):
    answer = requests.post(
        host.url("/v1/jobs"), json={**BODY, "num_inference_steps": 0}, timeout=20
    )
    assert answer.status_code == 400 and "steps=0 is not allowed" in assert_is_error(answer.json())


def test_streams_are_limited_and_given_back(host, monkeypatch):
    running = send(host, LONG)
    streams: list[requests.Response] = []
    for method in ("GET", "HEAD"):
        for _ in range(jobs_api.STREAMS_OF_CLIENT):
            with socket.create_connection(("127.0.0.1", host.port)) as connection:
                path = running["links"]["events"]
                connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def opened():
        """Once those are given back whose clients have gone."""
        answer = requests.get(host.url(running["links"]["events"]), stream=True, timeout=20)
        if answer.status_code == 200:
            streams.append(answer)
        return answer.status_code == 200

    for _ in range(jobs_api.STREAMS_OF_CLIENT):
        wait_until(opened, within_s=10, what="one more stream")
    answer = requests.get(host.url(running["links"]["events"]), timeout=20)
    assert answer.status_code == 429 and "event streams of this client are open" in assert_is_error(
        answer.json()
    )
    cancel(host, running["id"])
    for stream in streams:
        assert "cancelled" in stream.text
    wait_until(
        lambda: requests.get(host.url(running["links"]["events"]), timeout=20).status_code == 200,
        within_s=10,
        what="streams are given back",
    )


def test_trace_tells_what_the_rank_did_when(host):
    running = send(host, LONG)
    wait_for(host, running["id"], "running")
    sent = send(host, BODY)
    path = f"/v1/jobs/{sent['id']}/trace"
    assert requests.get(host.url(path), timeout=20).status_code == 409
    cancel(host, running["id"])
    wait_for(host, running["id"], "cancelled")
    none = requests.get(host.url(f"/v1/jobs/{running['id']}/trace"), timeout=20)
    assert (
        none.status_code == 404
        and "has no trace. Only jobs that are done have one" in assert_is_error(none.json())
    )
    wait_for(host, sent["id"], "done")
    events = requests.get(host.url(path), timeout=20).json()["traceEvents"]
    assert {"rank 0", f"job {sent['id']}"} == {
        event["args"]["name"] for event in events if event["ph"] == "M"
    }
    spans = [event for event in events if event["ph"] == "X"]
    assert [span["name"] for span in spans] == [
        "queue",
        "encode",
        "step 1",
        "step 2",
        "step 3",
        "step 4",
        "decode",
    ]
    for span, following in itertools.pairwise(spans[1:]):
        assert abs(span["ts"] + span["dur"] - following["ts"]) <= 2
    assert spans[0]["ts"] + spans[0]["dur"] <= spans[1]["ts"] + 1000


def test_figures_of_every_rank_are_told(host):
    host.generate_image(BODY)
    ranks = requests.get(host.url("/settings"), timeout=20).json()["ranks_now"]
    assert [rank["rank"] for rank in ranks] == [0]
    assert (
        ranks[0]["device"] == "cpu" and ranks[0]["memory_bytes"] > 1e8 and ranks[0]["seconds"] > 0
    )


def test_speed_of_a_video_must_be_a_number(host):
    done = wait_for(host, send(host, BODY)["id"], "done")
    answer = requests.get(host.url(done["links"]["result"] + "?fps=fast"), timeout=20)
    assert answer.status_code == 400 and "fps='fast' is not allowed" in assert_is_error(
        answer.json()
    )


def test_stages_of_a_job_are_told_and_counted(host):
    sent = send(host, BODY)
    wait_for(host, sent["id"], "done")
    stages = requests.get(host.url("/settings"), timeout=20).json()["last_report"]["stages"]
    assert set(stages) == {"encode", "step", "decode"} and all(
        seconds > 0 for seconds in stages.values()
    )
    requests.get(host.url(sent["links"]["result"]), timeout=20).raise_for_status()
    text = requests.get(host.url("/metrics"), timeout=20).text
    for stage in ("encode", "denoise", "decode", "serialise"):
        count = next(
            line
            for line in text.splitlines()
            if line.startswith(f'diffusion_stage_seconds_count{{stage="{stage}"}}')
        )
        assert float(count.split()[-1]) >= 1
    assert "diffusion_restarts 0.0" in text
