"""Jobs that are made in one batch: real hosts, real HTTP. The tests of one host run in this order;
the last one kills it.
"""

import signal
import threading

import pytest
import requests

from tests.hosts.harness import is_port_free, start_launcher, wait_until
from tests.hosts.sending import (
    ARGUMENTS,
    BODY,
    WRONG,
    OneRank,
    begun,
    difference,
    follow,
    over,
    pixels,
    send,
    show,
)

LONG = {**BODY, "num_inference_steps": 40}
BLOCKER = {**BODY, "num_inference_steps": 39}
"""A job that runs while the others are sent, of a kind of its own."""


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "next"


@pytest.fixture(scope="module")
def host(fault_file):
    with start_launcher(
        *ARGUMENTS,
        "--nproc_per_node=1",
        "--max_batch=3",
        environment={"FAULT_FILE": str(fault_file)},
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def alone():
    return OneRank()


def assert_images(host, alone, bodies, jobs):
    for body, job in zip(bodies, jobs, strict=True):
        assert job["state"] == "done" and job["seed"] == body["seed"], job
        assert difference(pixels(host, job["id"]), alone(body)) <= 1


def test_jobs_of_two_clients_are_made_in_pairs_in_their_order_and_each_gets_its_own_image(
    host, alone
):
    for _ in range(2):
        (job,) = over(host, send(host, BODY))
        assert (job["state"], job["batch"]) == ("done", 1)
    blocker = begun(host, BLOCKER)
    bodies = [
        {**BODY, "seed": seed, "prompt": f"image {seed}", "negative_prompt": f"blurry {seed}"}
        for seed in range(5)
    ]
    wrong = send(host, {**BODY, **WRONG}, client="wrong")
    jobs = [send(host, body, client="ab"[number % 2]) for number, body in enumerate(bodies)]
    done = over(host, blocker, *jobs)[1:]
    assert [job["batch"] for job in done] == [2, 2, 2, 2, 1] and {
        job["exactness"] for job in done
    } == {"reordered", "exact"}
    assert_images(host, alone, bodies, done)
    refused = show(host, wrong)
    assert refused["state"] == "failed" and refused["error"].startswith(
        "no step is left of 4 steps"
    )
    facts = host.get("/settings").json()
    assert facts["max_batch"] == 3 and set(
        facts["seconds_in_batches"]["64x64, 4 steps guided"]
    ) == {"1", "2"}
    assert 'diffusion_batch_jobs_total{batch="2"} 4.0' in host.get("/metrics").text


@pytest.mark.parametrize(
    "scheduler", ["[" * 5000, '{"a": ' + "1" * 5000 + "}"], ids=["deep", "long"]
)
def test_scheduler_that_cannot_be_read_is_refused_and_ends_no_rank(host, alone, scheduler):
    ranks = host.ranks()
    blocker = begun(host, BLOCKER)
    waiting = send(host, {**BODY, "seed": 6})
    answers = [
        host.session.post(host.url("/v1/jobs"), json={**BODY, "scheduler": scheduler}, timeout=20)
        for _ in range(2)
    ]
    ended = [
        answer.json() if answer.status_code == 400 else over(host, answer.json()["id"])[0]
        for answer in answers
    ]
    assert all("is not valid JSON" in (one.get("message") or one["error"]) for one in ended)
    assert_images(host, alone, [{**BODY, "seed": 6}], over(host, blocker, waiting)[1:])
    assert host.ranks() == ranks, "the host was started again"


def test_images_of_one_request_share_a_batch(host, alone):
    over(
        host, *[send(host, {**BODY, "num_inference_steps": 5}) for _ in range(2)]
    )  # a kind of its own: what is tried next is a matter of counting
    fields = {
        "prompt": "a red car",
        "negative_prompt": "blurry",
        "num_inference_steps": 5,
        "seed": 5,
        "guidance_scale": 7.0,
    }
    blocker = begun(host, BLOCKER)  # else the first image may begin before the others arrive
    answer = host.session.post(
        host.url("/v1/images/generations"), json={**fields, "n": 4, "size": "64x64"}, timeout=60
    ).json()
    over(host, blocker)
    done = [show(host, made["url"].split("/")[-2]) for made in answer["data"]]
    assert [job["batch"] for job in done] == [2, 2, 2, 2]
    assert_images(
        host,
        alone,
        [{**BODY, "num_inference_steps": 5, "seed": seed} for seed in (5, 6, 7, 8)],
        done,
    )


def test_one_job_of_a_batch_is_watched_and_another_cancelled_in_the_middle(host, alone):
    over(host, *[send(host, LONG) for _ in range(2)])
    blocker = begun(host, BLOCKER)
    bodies = [{**LONG, "seed": seed} for seed in (1, 2)]
    jobs = [send(host, body) for body in bodies]
    previews = []
    watcher = threading.Thread(target=follow, args=(host, jobs[1], previews))
    watcher.start()
    wait_until(lambda: len(previews) > 2, within_s=30, what="it has previews")
    assert [show(host, job)["state"] for job in jobs] == ["running"] * 2
    at = host.session.delete(host.url(f"/v1/jobs/{jobs[0]}"), timeout=20).json()["step"]
    wait_until(
        lambda: show(host, jobs[0])["state"] == "cancelled",
        within_s=10,
        what="it is cancelled",
        every_s=0.01,
    )
    assert show(host, jobs[1])["state"] == "running" and show(host, jobs[0])["step"] <= at + 2
    over(host, blocker)
    (done,) = over(host, jobs[1])
    assert (done["batch"], done["step"]) == (2, 40)
    assert_images(host, alone, bodies[1:], [done])
    watcher.join(timeout=20)


def test_batch_that_fails_is_made_one_by_one(host, alone, fault_file):
    ranks = host.ranks()
    blocker = begun(host, BLOCKER)
    bodies = [{**LONG, "seed": seed} for seed in range(2)]
    jobs = [send(host, body) for body in bodies]
    over(host, blocker)
    wait_until(
        lambda: show(host, jobs[1])["state"] == "running",
        within_s=30,
        what="both run",
        every_s=0.01,
    )
    fault_file.write_text("0 decode")
    done = over(host, *jobs)
    assert [(job["batch"], job["attempts"]) for job in done] == [(1, 2)] * 2
    assert_images(host, alone, bodies, done)
    assert host.ranks() == ranks


def test_killed_launcher_takes_every_process_with_it_and_frees_the_port(host):
    job = threading.Thread(target=_post_and_lose, args=(host,), daemon=True)
    job.start()
    wait_until(lambda: float(host.get("/progress").text) > 0, within_s=30, what="the job runs")
    assert len(host.tree()) >= 3
    host.session.close()
    assert host.signal_and_wait(signal.SIGKILL, within_s=3) < 3
    wait_until(lambda: is_port_free(host.port), within_s=4, what="the port is free")
    job.join(timeout=10)
    assert not job.is_alive()


def _post_and_lose(host):
    with pytest.raises(requests.ConnectionError):
        requests.post(
            host.url("/generate"), json={"prompt": "a dog", "num_inference_steps": 900}, timeout=60
        )


@pytest.mark.slow
def test_ranks_of_their_own_make_batches_too(alone):
    with start_launcher(
        *ARGUMENTS, "--backend=distrifuser", "--nproc_per_node=2", "--mode=throughput"
    ) as host:
        host.wait_until_ready()
        over(host, *[send(host, body) for body in (BODY, BODY, LONG, LONG)])
        blockers = [begun(host, BLOCKER), begun(host, BLOCKER)]
        bodies = [
            *[{**BODY, "seed": seed, "prompt": f"image {seed}"} for seed in range(4)],
            *[{**LONG, "seed": seed} for seed in range(4)],
        ]
        jobs = [send(host, body) for body in bodies]
        previews = []
        watcher = threading.Thread(target=follow, args=(host, jobs[7], previews))
        watcher.start()
        wait_until(lambda: len(previews) > 2, within_s=60, what="it has previews")
        host.session.delete(host.url(f"/v1/jobs/{jobs[6]}"), timeout=20)
        *done, cancelled, last = over(host, *blockers, *jobs)[2:]
        watcher.join(timeout=20)
        assert cancelled["state"] == "cancelled" and cancelled["step"] < 40
        assert [job["batch"] for job in [*done, last]] == [2] * 7 and {
            job["ranks"] for job in done
        } == {1}
        assert_images(host, alone, [*bodies[:6], bodies[7]], [*done, last])
        assert "Traceback" not in host.log
