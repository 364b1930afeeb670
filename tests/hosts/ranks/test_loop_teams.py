"""Ranks that split into teams: how they end, more ranks, and teams at all times. What else they do
is in test_loop_two_ranks.py.
"""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from tests.hosts.harness import READY_WITHIN_S, start_launcher, wait_until
from tests.hosts.sending import (
    ARGUMENTS,
    BODY,
    WRONG,
    OneRank,
    begun,
    both_run,
    difference,
    follow,
    from_file,
    over,
    pixels,
    send,
    show,
)

LONG = {**BODY, "num_inference_steps": 30}


@pytest.fixture(scope="module")
def host():
    with start_launcher(*ARGUMENTS, "--backend=distrifuser", "--nproc_per_node=2") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "next"


@pytest.fixture(scope="module")
def split_host(fault_file):
    """Its ranks are split at all times, so that no measured time decides whether they are."""
    with start_launcher(
        *ARGUMENTS,
        "--backend=distrifuser",
        "--nproc_per_node=2",
        "--mode=throughput",
        environment={"FAULT_FILE": str(fault_file)},
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def alone():
    return OneRank()


def test_images_of_one_request_are_shared_out_among_the_ranks_and_come_back_in_their_order(
    split_host, alone
):
    fields = {
        "prompt": "a red car",
        "negative_prompt": "blurry",
        "num_inference_steps": 4,
        "seed": 5,
        "guidance_scale": 7.0,
    }
    answer = requests.post(
        split_host.url("/v1/images/generations"),
        json={**fields, "n": 4, "size": "64x64"},
        timeout=60,
    ).json()
    assert [made["seed"] for made in answer["data"]] == [5, 6, 7, 8]
    jobs = [made["url"].split("/")[-2] for made in answer["data"]]
    assert [show(split_host, job)["ranks"] for job in jobs][:2] == [1, 1]
    for seed, job in enumerate(jobs, start=5):
        assert difference(pixels(split_host, job), alone({**BODY, "seed": seed})) <= 1
    asked = {
        "prompt": "a red car",
        "negative_prompt": "blurry",
        "steps": 4,
        "seed": 5,
        "cfg_scale": 7.0,
        "width": 64,
        "height": 64,
    }
    answer = requests.post(
        split_host.url("/sdapi/v1/txt2img"),
        json={**asked, "n_iter": 2, "batch_size": 2},
        timeout=60,
    ).json()
    assert json.loads(answer["info"])["all_seeds"] == [5, 6, 7, 8]
    for seed, image in enumerate(answer["images"], start=5):
        assert difference(from_file(image), alone({**BODY, "seed": seed})) <= 1


def test_interrupt_ends_the_images_of_a_request_on_all_teams_and_the_next_is_right(
    split_host, alone
):
    fields = {"prompt": "a red car", "steps": 300, "n_iter": 4, "width": 64, "height": 64}

    def jobs() -> list[dict]:
        return requests.get(split_host.url("/v1/jobs"), timeout=20).json()["jobs"]

    with ThreadPoolExecutor(1) as client:
        asked = client.submit(
            requests.post, split_host.url("/sdapi/v1/txt2img"), json=fields, timeout=120
        )
        wait_until(
            lambda: sum(job["state"] == "running" and job["step"] > 3 for job in jobs()) == 2,
            within_s=30,
            what="two of the images are begun",
        )
        requests.post(split_host.url("/sdapi/v1/interrupt"), timeout=20).raise_for_status()
        images = asked.result().json()["images"]
    assert len(images) == 2 and all(from_file(image).std() > 1 for image in images)
    (job,) = over(split_host, send(split_host, BODY))
    assert difference(pixels(split_host, job["id"]), alone(BODY)) <= 1


def test_split_jobs_have_previews_and_one_is_cancelled_and_one_refused_without_touching_the_others(
    split_host, alone
):
    jobs = [
        send(split_host, {**LONG, "num_inference_steps": 100, "seed": seed}) for seed in range(2)
    ]
    wrong = send(split_host, {**BODY, **WRONG})
    last = send(split_host, {**BODY, "seed": 3})
    both_run(split_host, jobs)
    previews = {job: [] for job in jobs}
    threads = [
        threading.Thread(target=follow, args=(split_host, job, previews[job])) for job in jobs
    ]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: all(len(found) > 2 for found in previews.values()),
        within_s=30,
        what="both have previews",
    )
    at = split_host.session.delete(split_host.url(f"/v1/jobs/{jobs[1]}"), timeout=20).json()["step"]
    (cancelled,) = over(split_host, jobs[1])
    assert cancelled["state"] == "cancelled" and cancelled["step"] <= at + 2
    assert show(split_host, jobs[0])["state"] == "running"
    refused, good = over(split_host, wrong, last)
    assert refused["state"] == "failed" and refused["error"].startswith(
        "no step is left of 4 steps"
    )
    assert difference(pixels(split_host, good["id"]), alone({**BODY, "seed": 3})) <= 1
    (first,) = over(split_host, jobs[0])
    assert (first["state"], first["ranks"], first["step"]) == ("done", 1, 100)
    for thread in threads:
        thread.join(timeout=20)


def test_failure_of_a_rank_in_its_team_costs_no_other_job(split_host, alone, fault_file):
    ranks = split_host.ranks()
    long = [send(split_host, LONG) for _ in range(2)]
    # of different lengths: jobs in one batch would all be started again
    bodies = [{**BODY, "seed": seed, "num_inference_steps": 4 + seed} for seed in range(3)]
    jobs = [send(split_host, body) for body in bodies]
    both_run(split_host, long)
    fault_file.write_text("1 decode")
    done = over(split_host, *long, *jobs)
    assert fault_file.read_text() == ""
    assert (
        all(job["state"] == "done" for job in done)
        and sum(job["attempts"] for job in done) == len(done) + 1
    )
    for body, job in zip(bodies, done[2:], strict=True):
        assert difference(pixels(split_host, job["id"]), alone(body)) <= 1
    (after,) = over(split_host, send(split_host, BODY))
    assert (after["state"], after["ranks"]) == ("done", 1)
    assert split_host.ranks() == ranks, "the host was started again"


@pytest.mark.slow
def test_rank_that_dies_while_the_ranks_are_split_costs_no_job(host, alone):
    old = host.ranks()
    blocker = begun(host, LONG)
    jobs = [
        send(host, {**BODY, "seed": seed, "num_inference_steps": steps})
        for seed, steps in ((0, 300), (1, 300), (2, 4), (3, 4))
    ]
    both_run(host, jobs)
    old[1].kill()
    wait_until(
        lambda: not any(process.is_running() for process in old.values()),
        within_s=20,
        what="the old ranks are gone",
    )
    wait_until(
        lambda: host.status() == 200, within_s=READY_WITHIN_S, what="ready again", every_s=0.2
    )
    done = over(host, blocker, *jobs)
    assert [job["state"] for job in done] == ["done"] * 5
    attempts = [job["attempts"] for job in done]  # only rank 1's own job loses one
    assert (attempts[0], sorted(attempts[1:3]), attempts[3:]) == (1, [1, 2], [1, 1])
    assert difference(pixels(host, jobs[3]), alone({**BODY, "seed": 3})) <= 1


@pytest.mark.slow
def test_host_that_is_stopped_while_its_ranks_are_split_ends_at_once(host):
    family = host.tree()
    blocker = begun(host, LONG)
    jobs = [send(host, {**LONG, "num_inference_steps": 900, "seed": seed}) for seed in range(3)]
    over(host, blocker)
    both_run(host, jobs)
    host.session.close()
    seconds = host.signal_and_wait(signal.SIGINT, within_s=10)
    assert seconds < 3.5, host.log
    assert not [
        process
        for process in family
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]
    assert host.process.returncode == 0 and "Traceback" not in host.log.split("stopping")[-1]


@pytest.mark.slow
def test_four_ranks_work_in_two_teams_of_two_and_as_four(tmp_path):
    """Two jobs that wait are for two teams, where the assumed times say so; a team whose groups
    broke has new ones when all have met.
    """
    fault_file = tmp_path / "next"
    arguments = (*ARGUMENTS, "--backend=distrifuser", "--sync_mode=full_sync", "--nproc_per_node=4")
    with start_launcher(*arguments, environment={"FAULT_FILE": str(fault_file)}) as host:
        host.wait_until_ready()
        assert set(host.get("/settings").json()["teams"]) == {"1", "2"}
        reference = {}
        for seed in (0, 1):
            (job,) = over(host, send(host, {**BODY, "seed": seed}))
            assert (job["state"], job["ranks"]) == ("done", 4)
            reference[seed] = pixels(host, job["id"])
        blocker = begun(host, LONG)
        jobs = [send(host, {**BODY, "seed": seed}) for seed in (0, 1)]
        fault_file.write_text("3 denoiser")
        done = over(host, blocker, *jobs)
        assert [job["state"] for job in done] == ["done"] * 3 and sum(
            job["attempts"] for job in done
        ) == 4, host.log
        assert {job["ranks"] for job in done[1:]} <= {2, 4} and 2 in {
            job["ranks"] for job in done[1:]
        }
        for seed, job in enumerate(jobs):
            assert difference(pixels(host, job), reference[seed]) <= 1
        blocker = begun(host, LONG)
        done = over(host, blocker, *[send(host, {**BODY, "seed": seed % 2}) for seed in range(8)])
        assert [job["state"] for job in done] == ["done"] * 9 and 1 in {
            job["ranks"] for job in done
        }
        for seed, job in enumerate(done[1:]):
            assert difference(pixels(host, job["id"]), reference[seed % 2]) <= 1


@pytest.mark.slow
def test_throughput_mode_gives_each_rank_its_own_job_also_where_there_is_only_one(alone):
    with start_launcher(
        *ARGUMENTS, "--backend=distrifuser", "--nproc_per_node=2", "--mode=throughput"
    ) as host:
        host.wait_until_ready()
        done = over(host, *[send(host, {**BODY, "seed": seed}) for seed in range(3)])
        done += over(host, send(host, {**BODY, "seed": 3}))
        assert [(job["state"], job["ranks"]) for job in done] == [("done", 1)] * 4
        for seed, job in enumerate(done):
            assert difference(pixels(host, job["id"]), alone({**BODY, "seed": seed})) <= (
                job["batch"] > 1
            )
        host.signal_and_wait(signal.SIGINT, within_s=10)
        assert "Traceback" not in host.log
