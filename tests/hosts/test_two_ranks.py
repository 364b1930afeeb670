"""One real host of two ranks, from its first second to its end: launcher, torchelastic, both ranks, HTTP.

The tests use one host, in this order: it is loading, it is ready, ranks fail, a rank is killed, it is stopped in the middle of a job.
"""

import io
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.hosts.client import assert_is_error, decode
from tests.hosts.harness import READY_WITHIN_S, run_launcher, start_launcher, wait_until

FAULTS = Path(__file__).parent / "faults"
BODY = {"positive": "a red car", "negative": "blurry", "steps": 4, "seed": 5, "cfg": 7.0}


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "next"


@pytest.fixture(scope="module")
def host(fault_file):
    environment = {"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(fault_file)}
    arguments = ("--type=sdxl", f"--checkpoint={checkpoint('sdxl')}", "--backend=distrifuser", "--nproc_per_node=2")
    with start_launcher(*arguments, "--height=64", "--width=64", environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def reference(host):
    """The picture of BODY before anything went wrong."""
    host.wait_until_ready()
    return pixels(host.post(BODY))


def pixels(answer):
    body = answer.json()
    assert answer.status_code == 200, body["message"]
    return np.asarray(decode(body["output"])).astype(int)


def test_host_listens_and_says_wait_before_it_has_loaded(host):
    host.wait_until_listening()
    started = time.monotonic()
    assert (host.status(), host.get("/initialize").text) == (202, "WAIT")
    assert host.get("/progress").text == "0"
    assert host.get("/healthz").json()["phase"] == "loading"
    assert time.monotonic() - started < 3


def test_request_during_loading_waits_for_the_model(host):
    answer = host.post(BODY, timeout=READY_WITHIN_S)
    assert pixels(answer).std() > 1
    assert host.status() == 200


def test_two_ranks_draw_what_one_rank_draws(host, reference):
    from backends.model_table import read_table
    from backends.pipeline import load_pipeline
    from backends.request import GenerateRequest, LoadRequest

    load = LoadRequest(model_type="sdxl", checkpoint=str(checkpoint("sdxl")), variant="fp32")

    alone = load_pipeline(read_table()["sdxl"], load, device=torch.device("cpu")).generate(
        GenerateRequest(
            prompt="a red car", negative_prompt="blurry", num_inference_steps=4, seed=5, guidance_scale=7.0, height=64, width=64
        )
    )
    assert np.abs(alone.frames[0].astype(int) - reference).max() <= 1
    assert len(host.ranks()) == 2
    assert host.get("/settings").json()["axes"]["cfg"] == 2


def test_second_host_on_the_port_ends_before_loading_and_disturbs_nothing(host, reference):
    started = time.monotonic()
    done = run_launcher("--type=sdxl", f"--port={host.port}")
    assert done.returncode == 2
    assert done.stderr == f"error: --port={host.port} is in use on 127.0.0.1. Stop what listens there, or choose another port.\n"
    assert time.monotonic() - started < 10
    assert (pixels(host.post(BODY)) == reference).all()


def test_pictures_asked_for_at_once_are_not_swapped(host, reference):
    alone = {seed: pixels(host.post({**BODY, "seed": seed})) for seed in (5, 6)}
    together = {}

    def post(seed):
        together[seed] = pixels(requests.post(host.url("/generate"), json={**BODY, "seed": seed}, timeout=60))

    threads = [threading.Thread(target=post, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(np.abs(together[seed] - alone[seed]).max() <= 1 for seed in alone)  # on one rank or on both
    assert (alone[5] != alone[6]).any()


def test_ten_clients_at_once_are_served_in_turns_and_get_their_own_pictures(host, reference):
    blocker = _send(host, {**BODY, "steps": 40})
    wait_until(lambda: host.get(f"/v1/jobs/{blocker['id']}").json()["state"] == "running", within_s=30, what="both ranks work on it")
    sent = [_send(host, {**BODY, "seed": seed}, client=f"client {seed % 5}") for seed in range(10)]
    done = [_over(host, job["id"]) for job in sent]
    assert [job["state"] for job in done] == ["done"] * 10 and _over(host, blocker["id"])["state"] == "done"
    pictures = [host.get(job["links"]["result"]).content for job in done]
    assert len(set(pictures)) == 10
    events = host.get(f"/v1/jobs/{blocker['id']}/trace").json()["traceEvents"]
    assert {event["tid"] for event in events if event["name"] == "step 1"} == {0, 1}
    for seed in (0, 7):
        together = np.asarray(Image.open(io.BytesIO(pictures[seed]))).astype(int)  # on one rank or on both
        assert np.abs(together - pixels(host.post({**BODY, "seed": seed}))).max() <= 1


def test_cancelled_job_ends_on_both_ranks_within_two_steps_and_the_next_is_right(host, reference):
    sent = _send(host, {**BODY, "steps": 100})
    wait_until(lambda: host.get(f"/v1/jobs/{sent['id']}").json()["step"] > 3, within_s=30, what="it runs")
    at = host.session.delete(host.url(f"/v1/jobs/{sent['id']}"), timeout=20).json()["step"]
    ended = _over(host, sent["id"])
    assert ended["state"] == "cancelled" and ended["step"] <= at + 2
    assert (pixels(host.post(BODY)) == reference).all()
    assert [rank["rank"] for rank in host.get("/settings").json()["ranks_now"]] == [0, 1]


def _send(host, body, client="me"):
    return requests.post(host.url("/v1/jobs"), json=body, headers={"Authorization": f"Bearer {client}"}, timeout=20).json()


def _over(host, job_id):
    wait_until(lambda: host.get(f"/v1/jobs/{job_id}").json()["state"] in ("done", "failed", "cancelled"), within_s=60, what="it is over")
    return host.get(f"/v1/jobs/{job_id}").json()


@pytest.mark.parametrize("place", ["denoiser", "decode"])
@pytest.mark.parametrize("rank", [0, 1])
def test_failure_of_one_rank_is_tried_again_then_answered_by_name_and_the_next_picture_is_right(rank, place, host, reference, fault_file):
    ranks = host.ranks()
    fault_file.write_text(f"{rank} {place}")
    assert (pixels(host.post(BODY)) == reference).all(), "the second attempt drew something else"
    assert fault_file.read_text() == "" and "is begun again" in host.log
    fault_file.write_text(f"{rank} {place}\n{rank} {place}")
    answer = host.post(BODY, timeout=60)
    assert answer.status_code == 500
    assert assert_is_error(answer.json()) == f"rank {rank} failed: ArithmeticError: a fault of the test in {place}"
    assert host.get("/progress").text == "0"
    assert (pixels(host.post(BODY)) == reference).all()
    assert host.ranks() == ranks, "the host was started again"


def test_failure_of_both_ranks_at_once_is_one_answer(host, reference, fault_file):
    fault_file.write_text("0 decode\n1 decode\n" * 2)
    assert "a fault of the test in decode" in assert_is_error(host.post(BODY, timeout=60).json())
    fault_file.write_text("")
    assert (pixels(host.post(BODY)) == reference).all()


def test_bad_request_reaches_no_rank(host, reference):
    answer = host.post({**BODY, "scheduler": "nonsense"})
    assert answer.status_code == 400
    assert_is_error(answer.json())
    assert (pixels(host.post(BODY)) == reference).all()


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_rank_is_replaced_and_no_job_is_lost(rank, host, reference):
    old = host.ranks()
    running, *waiting = [_send(host, {**BODY, "steps": steps}) for steps in (40, 4, 4)]
    answers = []
    client = threading.Thread(target=lambda: answers.append(_outcome(host, {**BODY, "steps": 4})))
    client.start()
    wait_until(lambda: host.get(f"/v1/jobs/{running['id']}").json()["step"] > 3, within_s=30, what="the job runs")
    old[rank].kill()
    client.join(timeout=30)
    assert not client.is_alive(), "the client was left waiting"
    assert answers == ["connection lost"] or "the ranks are started again" in answers[0], answers
    wait_until(lambda: not any(process.is_running() for process in old.values()), within_s=20, what="the old ranks are gone")
    wait_until(lambda: host.status() == 200, within_s=READY_WITHIN_S, what="ready again", every_s=0.2)
    for job in waiting:
        assert _over(host, job["id"])["state"] == "done"
        picture = Image.open(io.BytesIO(host.get(job["links"]["result"]).content))
        assert np.abs(np.asarray(picture).astype(int) - reference).max() <= 1  # on one rank or on both
    over = _over(host, running["id"])
    assert (over["state"], over["attempts"], over["step"]) == ("done", 2, 40)
    assert f"job {running['id']} is begun again" in host.log
    assert not set(host.ranks().values()) & set(old.values())


def _outcome(host, body):
    try:
        return f"error: {assert_is_error(requests.post(host.url('/generate'), json=body, timeout=120).json())}"
    except requests.ConnectionError:
        return "connection lost"


def test_stop_signal_during_a_job_ends_everything_and_answers_the_client(host, reference):
    family = host.tree()
    answers = []
    job = threading.Thread(target=lambda: answers.append(_outcome(host, {**BODY, "steps": 900})))
    job.start()
    wait_until(lambda: 0 < float(host.get("/progress").text) < 100, within_s=30, what="the job runs")
    host.session.close()
    seconds = host.signal_and_wait(signal.SIGINT, within_s=10)
    job.join(timeout=10)
    assert seconds < 3.5, host.log
    assert answers and answers[0].startswith("error: "), answers
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert host.process.returncode == 0
    assert "Traceback" not in host.log.split("stopping")[-1]


def test_log_names_what_was_chosen_and_no_prompt(host):
    assert "chosen: " in host.log and "failed on rank 1: ArithmeticError" in host.log
    assert "red car" not in host.log
