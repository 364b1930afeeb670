"""The WSGI application over Flask's client: every answer that is an error has the four keys, and
says what to do.

The queue is real; a thread in place of the rank loop finishes its jobs with a grey image, or as the
test says.
"""

import json
import os

import pytest
from PIL import Image

from backends.errors import (
    BusyError,
    CancelledError,
    PlanError,
    RankError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from backends.request import GenerateRequest
from hosts.http.errors import status_of
from hosts.jobs.queue import JobQueue
from hosts.supervision.host_state import Phase
from tests.hosts.application import answer_jobs, make_client
from tests.hosts.client import assert_is_error, decode, encode


def test_initialize_says_wait_then_ok(client, state):
    state.phase = Phase.LOADING
    assert (client.get("/initialize").status_code, client.get("/initialize").text) == (202, "WAIT")
    state.become(Phase.READY)
    assert (client.get("/initialize").status_code, client.get("/initialize").text) == (200, "OK")


def test_initialize_is_200_after_a_failed_load_so_that_clients_come_for_the_reason(
    client, state, queue
):
    state.become(Phase.FAILED, "no such checkpoint")
    queue.close(UnavailableError("no such checkpoint"))
    assert client.get("/initialize").status_code == 200
    answer = client.post("/generate", json={"positive": "a"})
    assert answer.status_code == 503
    assert assert_is_error(answer.get_json()) == "no such checkpoint"


def test_host_that_stops_is_not_taken_for_a_ready_one(client, state):
    state.become(Phase.STOPPING)
    assert client.get("/initialize").status_code == 503


def test_progress_is_a_bare_number(client, queue):
    assert (client.get("/progress").text, client.get("/progress").mimetype) == ("0", "text/plain")
    job = queue.submit(GenerateRequest(prompt="a", seed=1))
    queue.next()
    queue.record_step(job, 3, 8)
    assert client.get("/progress").text == "37.5"
    assert float(client.get("/progress").text) == 37.5


def test_healthz_and_settings_tell_the_state(client, state):
    assert client.get("/healthz").get_json() == {"phase": "ready", "reason": "", "waiting": 0}
    state.tell({"backend": "single"})
    assert client.get("/settings").get_json() == {
        "type": "sdxl",
        "given": {"type": "sdxl"},
        "backend": "single",
    }
    state.become(Phase.FAILED, "why")
    answer = client.get("/healthz")
    assert (answer.status_code, answer.get_json()["reason"]) == (503, "why")


@pytest.mark.parametrize(
    ("type_name", "keys"),
    [
        ("sdxl", {"message", "output", "is_image", "latent"}),
        ("sdup", {"message", "output", "is_image"}),
    ],
)
def test_image_answer_has_exactly_its_keys(type_name, keys, queue, state):
    client = make_client(queue, state, type=type_name)
    answer_jobs(queue, latents="latent" in keys)
    body = client.post(
        "/generate", json={"positive": "a", "image": encode(Image.new("RGB", (16, 16)))}
    ).get_json()
    assert set(body) == keys
    assert (body["message"], body["is_image"]) == ("OK", True)
    assert decode(body["output"]).size == (24, 16)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("image/png", "image/png"),
        ("image/webp,image/png;q=0.5", "image/webp"),
        ("image/*", "image/png"),
        ("*/*", "application/json"),
        ("text/html,application/json;q=0.9", "application/json"),
    ],
)
def test_accept_chooses_the_kind_of_answer(accept, content_type, client, queue):
    answer_jobs(queue)
    answer = client.post("/generate", json={"positive": "a", "seed": 5}, headers={"Accept": accept})
    assert (answer.status_code, answer.mimetype) == (200, content_type)
    assert (answer.headers.get("X-Seed") == "5") is (content_type != "application/json")


@pytest.mark.parametrize(
    ("type_name", "accept"), [("sdxl", "video/mp4"), ("ad", "image/png"), ("sdxl", "text/html")]
)
def test_accept_of_what_this_host_does_not_make_is_refused_before_the_job(
    type_name, accept, queue, state
):
    answer = make_client(queue, state, type=type_name).post(
        "/generate", json={"positive": "a"}, headers={"Accept": accept}
    )
    assert answer.status_code == 400
    assert "Allowed: application/json" in assert_is_error(answer.get_json())
    assert queue.num_waiting == 0


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1", b"nothing"])
def test_bad_json_is_answered_as_an_error(data, client):
    answer = client.post("/generate", data=data, content_type="application/json")
    assert answer.status_code == 400
    assert "not valid JSON" in assert_is_error(answer.get_json())


def test_json_that_is_nested_too_deeply_is_answered_as_an_error(client):
    answer = client.post("/generate", data=b"[" * 100_000, content_type="application/json")
    assert answer.status_code == 400
    assert "nested too deeply" in assert_is_error(answer.get_json())


@pytest.mark.parametrize("path", ["/generate", "/v1/jobs", "/v1/images/generations"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"num_train_timesteps": 10**8}, "num_train_timesteps is not for requests"),
        ({"solver_order": 10**8}, "solver_order=100000000 is not allowed"),
        ({"use_karas_sigmas": True}, "Did you mean 'use_karras_sigmas'"),
        ({"a": {"a": 1}}, "is not a setting of any scheduler"),
    ],
    ids=str,
)
def test_scheduler_setting_that_is_not_for_requests_is_refused_before_the_job(
    path, as_text, setting, said, client, queue
):
    scheduler = {"scheduler": "ddim", **setting}
    answer = client.post(
        path, json={"prompt": "a", "scheduler": json.dumps(scheduler) if as_text else scheduler}
    )
    assert answer.status_code == 400 and said in answer.get_data(as_text=True).encode().decode(
        "unicode_escape"
    )
    assert queue.num_waiting == 0


NESTED = '{"a": ' * 500 + "1" + "}" * 500


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"]
)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (NESTED, "nested deeper than 16 lists and objects"),
        ("[" * 500 + "]" * 500, "nested deeper than 16 lists and objects"),
        ("[" + "0," * 300_000 + "0]", "holds more than 200000 values"),
        ("NaN", "Send a finite number"),
        ("[1, -Infinity]", "Send a finite number"),
        ("1" + "0" * 400, "Send a finite number"),
        ("1e400", "Send a finite number"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ('{"a\\u0000b": 1}', "is not allowed as a name"),
        ('{"a\\nb": 1}', "is not allowed as a name"),
        (f'{{"{"a" * 2000}": 1}}', "is not allowed as a name"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("field", ["scheduler", "prompt", "lora", "sigmas", "unheard_of"])
def test_json_beyond_all_bounds_is_refused_wherever_it_is(path, field, value, said, client, queue):
    answer = client.post(
        path,
        data=f'{{"prompt": "a", "{field}": {value}}}'.encode(),
        content_type="application/json",
    )
    assert answer.status_code == 400
    assert said in answer.get_data(as_text=True)
    assert queue.num_waiting == 0


@pytest.mark.parametrize("data", [b"[]", b'"text"', b"5", b"null"])
def test_json_that_is_no_object_is_answered_as_an_error(data, client):
    answer = client.post("/generate", data=data, content_type="application/json")
    assert answer.status_code == 400
    assert "must be one JSON object" in assert_is_error(answer.get_json())


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_other_content_types_are_refused(content_type, client):
    answer = client.post("/generate", data=b"{}", content_type=content_type)
    assert answer.status_code == 415
    assert "Send application/json" in assert_is_error(answer.get_json())


def test_content_type_with_a_charset_is_fine(client, queue):
    answer_jobs(queue)
    data = json.dumps({"positive": "a"})
    assert (
        client.post(
            "/generate", data=data, content_type="application/json; charset=utf-8"
        ).status_code
        == 200
    )


@pytest.mark.parametrize("path", ["/favicon.ico", "/nothing", "/set_result", "/apply"])
def test_other_paths_are_answered_as_errors(path, client):
    answer = client.get(path)
    assert answer.status_code == 404
    assert_is_error(answer.get_json())


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/generate"), ("DELETE", "/generate"), ("PUT", "/initialize"), ("PATCH", "/progress")],
)
def test_other_methods_are_answered_as_errors(method, path, client):
    answer = client.open(path, method=method)
    assert answer.status_code == 405
    assert_is_error(answer.get_json())


def test_refusals_that_pass_say_when_to_ask_again(client, queue, state):
    queue.close(UnavailableError("stopping"))
    answer = client.post("/generate", json={"positive": "a"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert_is_error(answer.get_json())


def test_idempotency_key_makes_one_job_of_many_requests(client, queue):
    headers = {"Idempotency-Key": "one"}
    answers = [client.post("/v1/jobs", json={"prompt": "a"}, headers=headers) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {202} and len(
        {answer.get_json()["id"] for answer in answers}
    ) == 1
    assert queue.num_waiting == 1
    other = client.post("/v1/jobs", json={"prompt": "b"}, headers=headers)
    assert other.status_code == 400 and "which asked for something else" in assert_is_error(
        other.get_json()
    )


@pytest.mark.parametrize("key", ["", "a" * 256, "\xe9"])
def test_idempotency_key_that_is_none_is_refused(key, client):
    answer = client.post("/v1/jobs", json={"prompt": "a"}, headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert "Idempotency-Key must have 1 to 255 printable ASCII characters" in assert_is_error(
        answer.get_json()
    )


def test_field_that_cannot_be_meant_is_answered_by_name_and_not_queued(client, queue):
    answer = client.post("/generate", json={"positive": "a", "steps": 0})
    assert answer.status_code == 400
    assert assert_is_error(answer.get_json()).startswith("steps=0 is not allowed")
    assert queue.num_waiting == 0


def test_pickle_that_would_run_code_is_refused_and_does_not_run(client, tmp_path):
    class Exploit:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    answer = client.post("/generate", json={"positive": "a", "latent": encode(Exploit())})
    assert answer.status_code == 400
    assert assert_is_error(answer.get_json()).startswith("latent: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("cfg is wrong", field="cfg"), 400),
        (UnsupportedError("not with this type"), 422),
        (PlanError("sizes do not fit"), 422),
        (CancelledError("cancelled at step 3"), 409),
        (UnavailableError("stopping"), 503),
        (RankError("rank 1 failed: x", rank=1, trace="secret trace"), 500),
    ],
)
def test_error_of_the_job_is_answered_with_its_status(error, status, client, queue):
    answer_jobs(queue, error=error)
    answer = client.post("/generate", json={"positive": "a"})
    assert answer.status_code == status
    assert assert_is_error(answer.get_json()) == str(error)


def test_full_queue_answers_429(state):
    queue = JobQueue(capacity=0)
    answer = make_client(queue, state).post("/generate", json={"positive": "a"})
    assert answer.status_code == 429
    assert "the queue is full" in assert_is_error(answer.get_json())
    assert status_of(BusyError("full")) == 429


def test_bug_in_a_route_is_answered_without_its_details(client, queue, monkeypatch, caplog):
    monkeypatch.setattr(queue, "submit", lambda request, **_: 1 / 0)
    answer = client.post("/generate", json={"positive": "a"})
    assert answer.status_code == 500
    assert (
        assert_is_error(answer.get_json())
        == "internal error: ZeroDivisionError. The log of rank 0 says more."
    )
    assert "division by zero" in caplog.text


def test_refusals_of_the_existing_clients_are_logged_without_prompts(client, caplog):
    """They throw the reason away, and tell their users to look here."""
    client.post("/generate", json={"positive": "a private wish", "height": 9000})
    (record,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "height=9000 is not allowed" in record.getMessage(), record.getMessage()
    client.post(
        "/generate", json={"prompt": "a private (wish:99999999999)", "prompt_syntax": "a1111"}
    )
    assert len(caplog.records) == 2 and "private" not in caplog.text


def test_prompts_are_not_logged(client, queue, caplog):
    caplog.set_level("INFO")
    answer_jobs(queue)
    client.post("/generate", json={"positive": "a private wish"})
    assert "private" not in caplog.text


def test_ready_probe_follows_the_phase(client, state):
    state.become(Phase.LOADING)
    assert (client.get("/readyz").status_code, client.get("/livez").status_code) == (503, 200)
    state.become(Phase.READY)
    assert client.get("/readyz").status_code == 200


def test_metrics_count_jobs_by_outcome_and_show_what_ranks_reported(client, queue, state):
    state.tell(
        {
            "ranks_now": [
                {"rank": 0, "memory_bytes": 5, "seconds": 1.5},
                {"rank": 1, "memory_bytes": 7, "wait_s": 0.5},
            ]
        }
    )
    answer_jobs(queue)
    assert client.post("/generate", json={"positive": "a"}).status_code == 200
    text = client.get("/metrics").get_data(as_text=True)
    for line in (
        'diffusion_jobs_total{state="done"} 1.0',
        "diffusion_queue_seconds_count 1.0",
        "diffusion_job_seconds_count 1.0",
        "diffusion_jobs_waiting 0.0",
        'diffusion_rank_memory_bytes{rank="1"} 7.0',
        'diffusion_rank_wait{rank="1"} 0.5',
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize("path", ["/readyz", "/initialize"])
def test_reason_is_no_page(path, client, state):
    state.become(Phase.WAITING, "<script>alert(1)</script>")
    answer = client.get(path)
    assert answer.mimetype == "text/plain" and "<script>" in answer.text
