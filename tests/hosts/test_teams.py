"""Ranks that split into teams when several jobs wait, and meet again: real hosts, real HTTP. The tests of one host run in this order."""

import base64
import io
import json
import signal
import threading

import numpy as np
import psutil
import pytest
import requests
import torch
from PIL import Image

from backends.model_table import read_table
from backends.pipeline import load_pipeline
from backends.request import GenerateRequest, LoadRequest
from tests.checkpoints import checkpoint
from tests.hosts.harness import READY_WITHIN_S, start_launcher, wait_until
from tests.hosts.test_two_ranks import BODY, FAULTS

LONG = {**BODY, "steps": 30}
ARGUMENTS = ("--type=sdxl", f"--checkpoint={checkpoint('sdxl')}", "--height=64", "--width=64")


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "next"


@pytest.fixture(scope="module")
def host(fault_file):
    environment = {"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(fault_file)}
    with start_launcher(*ARGUMENTS, "--backend=distrifuser", "--nproc_per_node=2", environment=environment) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def alone():
    """seed -> the picture of BODY that one rank makes, without a host."""
    load = LoadRequest(model_type="sdxl", checkpoint=str(checkpoint("sdxl")), variant="fp32")
    pipeline = load_pipeline(read_table()["sdxl"], load, device=torch.device("cpu"))
    made = {}

    def picture(seed):
        if seed not in made:
            request = GenerateRequest(
                prompt="a red car", negative_prompt="blurry", num_inference_steps=4, seed=seed, guidance_scale=7.0, height=64, width=64
            )
            made[seed] = pipeline.generate(request).frames[0]
        return made[seed]

    return picture


def send(host, body, client="me"):
    answer = requests.post(host.url("/v1/jobs"), json=body, headers={"Authorization": f"Bearer {client}"}, timeout=20)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def show(host, job):
    return host.get(f"/v1/jobs/{job}").json()


def begun(host, body):
    """A job that both ranks work on: what comes now waits until it is over."""
    job = send(host, body)
    wait_until(lambda: show(host, job)["state"] == "running", within_s=30, what="it runs", every_s=0.01)
    return job


def over(host, *jobs, within_s=120):
    for job in jobs:
        wait_until(lambda: show(host, job)["state"] in ("done", "failed", "cancelled"), within_s=within_s, what="it is over")  # noqa: B023
    return [show(host, job) for job in jobs]


def pixels(host, job):
    return np.asarray(Image.open(io.BytesIO(host.get(f"/v1/jobs/{job}/result").content)))


def both_run(host, jobs, *, within_s=30):
    """Wait until two of the jobs run at the same time; they."""
    running = []

    def two():
        running[:] = [job for job in jobs if show(host, job)["state"] == "running"]
        return len(running) == 2

    wait_until(two, within_s=within_s, what="two jobs run at once")
    return running


def test_job_alone_has_both_ranks_and_six_at_once_have_one_each_and_give_the_pictures_of_one_rank(host, alone):
    (single,) = over(host, send(host, BODY))
    assert (single["state"], single["ranks"]) == ("done", 2)
    blocker = begun(host, LONG)
    jobs = [send(host, {**BODY, "seed": seed}) for seed in range(6)]
    both_run(host, jobs)
    done = over(host, blocker, *jobs)
    assert [job["state"] for job in done] == ["done"] * 7
    assert [job["ranks"] for job in done[:3]] == [2, 1, 1]  # the last ones may be for both again, if that looked quicker
    for seed, job in enumerate(done[1:]):
        difference = np.abs(pixels(host, job["id"]).astype(int) - alone(seed)).max()
        assert difference == 0 if (job["ranks"], job["batch"]) == (1, 1) else difference <= 1
        assert job["seed"] == seed and job["step"] == 4
    assert host.get("/settings").json()["teams"] == {"1": "single: one rank (exact)"}
    assert set(host.get("/settings").json()["seconds_per_megapixel_step"]) == {"1", "2"}


def test_clients_keep_their_turns_while_the_ranks_are_split(host):
    blocker = begun(host, LONG)
    greedy = [send(host, {**BODY, "seed": seed}, client="greedy") for seed in range(4)]
    modest = send(host, BODY, client="modest")
    assert show(host, modest)["position"] < show(host, greedy[1])["position"]
    assert {job["state"] for job in over(host, blocker, *greedy, modest)} == {"done"}


def test_pictures_of_one_request_are_shared_out_among_the_ranks_and_come_back_in_their_order(host, alone):
    over(host, send(host, BODY))  # the ranks are together
    fields = {"prompt": "a red car", "negative_prompt": "blurry", "steps": 4, "seed": 5, "guidance_scale": 7.0}
    answer = requests.post(host.url("/v1/images/generations"), json={**fields, "n": 4, "size": "64x64"}, timeout=60).json()
    assert [made["seed"] for made in answer["data"]] == [5, 6, 7, 8]
    jobs = [made["url"].split("/")[-2] for made in answer["data"]]
    assert [show(host, job)["ranks"] for job in jobs][:2] == [1, 1]
    for seed, job in enumerate(jobs, start=5):
        assert np.abs(pixels(host, job).astype(int) - alone(seed)).max() <= 1
    asked = {"prompt": "a red car", "negative_prompt": "blurry", "steps": 4, "seed": 5, "cfg_scale": 7.0, "width": 64, "height": 64}
    answer = requests.post(host.url("/sdapi/v1/txt2img"), json={**asked, "n_iter": 2, "batch_size": 2}, timeout=60).json()
    assert json.loads(answer["info"])["all_seeds"] == [5, 6, 7, 8]
    for seed, image in enumerate(answer["images"], start=5):
        made = np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).astype(int)
        assert np.abs(made - alone(seed)).max() <= 1


def test_split_jobs_have_previews_and_one_is_cancelled_and_one_refused_without_touching_the_others(host, alone):
    blocker = begun(host, LONG)
    jobs = [send(host, {**LONG, "steps": 100, "seed": seed}) for seed in range(2)]
    wrong = send(host, {**BODY, "clip_skip": 12})
    last = send(host, {**BODY, "seed": 3})
    both_run(host, jobs)
    previews = {job: [] for job in jobs}
    threads = [threading.Thread(target=_follow, args=(host, job, previews[job])) for job in jobs]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(len(found) > 2 for found in previews.values()), within_s=30, what="both have previews")
    at = host.session.delete(host.url(f"/v1/jobs/{jobs[1]}"), timeout=20).json()["step"]
    (cancelled,) = over(host, jobs[1])
    assert cancelled["state"] == "cancelled" and cancelled["step"] <= at + 2
    assert show(host, jobs[0])["state"] == "running"
    refused, good = over(host, wrong, last)
    assert refused["state"] == "failed" and refused["error"].startswith("clip_skip=12 is not allowed")
    assert np.abs(pixels(host, good["id"]).astype(int) - alone(3)).max() <= 1
    first, _ = over(host, jobs[0], blocker)
    assert (first["state"], first["ranks"], first["step"]) == ("done", 1, 100)
    for thread in threads:
        thread.join(timeout=20)


def _follow(host, job, found):
    with requests.get(host.url(f"/v1/jobs/{job}/events?previews=1"), stream=True, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and b'"image"' in line:
                found.append(json.loads(line[6:])["step"])


def test_failure_of_a_rank_in_its_team_costs_no_other_job(host, alone, fault_file):
    ranks = host.ranks()
    blocker = begun(host, LONG)
    long = [send(host, LONG) for _ in range(2)]
    jobs = [send(host, {**BODY, "seed": seed}) for seed in range(3)]
    both_run(host, long)
    fault_file.write_text("1 decode")
    done = over(host, blocker, *long, *jobs)
    assert fault_file.read_text() == ""
    assert all(job["state"] == "done" for job in done) and sum(job["attempts"] for job in done) == len(done) + 1
    for seed, job in enumerate(done[3:]):
        assert np.abs(pixels(host, job["id"]).astype(int) - alone(seed)).max() <= 1
    (after,) = over(host, send(host, BODY))
    assert (after["state"], after["ranks"]) == ("done", 2)
    assert host.ranks() == ranks, "the host was started again"


@pytest.mark.slow
def test_rank_that_dies_while_the_ranks_are_split_costs_no_job(host, alone):
    old = host.ranks()
    blocker = begun(host, LONG)
    jobs = [send(host, {**BODY, "seed": seed, "steps": steps}) for seed, steps in ((0, 300), (1, 300), (2, 4), (3, 4))]
    both_run(host, jobs)
    old[1].kill()
    wait_until(lambda: not any(process.is_running() for process in old.values()), within_s=20, what="the old ranks are gone")
    wait_until(lambda: host.status() == 200, within_s=READY_WITHIN_S, what="ready again", every_s=0.2)
    done = over(host, blocker, *jobs)
    assert [job["state"] for job in done] == ["done"] * 5
    assert [job["attempts"] for job in done] == [1, 2, 2, 1, 1]
    assert np.abs(pixels(host, jobs[3]).astype(int) - alone(3)).max() <= 1


def test_host_that_is_stopped_while_its_ranks_are_split_ends_at_once(host):
    family = host.tree()
    blocker = begun(host, LONG)
    jobs = [send(host, {**LONG, "steps": 900, "seed": seed}) for seed in range(3)]
    over(host, blocker)
    both_run(host, jobs)
    host.session.close()
    seconds = host.signal_and_wait(signal.SIGINT, within_s=10)
    assert seconds < 3.5, host.log
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert host.process.returncode == 0 and "Traceback" not in host.log.split("stopping")[-1]


@pytest.mark.slow
def test_four_ranks_work_in_two_teams_of_two_and_as_four(tmp_path):
    """Two jobs that wait are for two teams, where the assumed times say so; a team whose groups broke has new ones when all have met."""
    fault_file = tmp_path / "next"
    environment = {"PYTHONPATH": str(FAULTS), "FAULT_FILE": str(fault_file)}
    arguments = (*ARGUMENTS, "--backend=distrifuser", "--sync_mode=full_sync", "--nproc_per_node=4")
    with start_launcher(*arguments, environment=environment) as host:
        host.wait_until_ready()
        assert set(host.get("/settings").json()["teams"]) == {"1", "2"}
        reference = {}
        for seed in (0, 1):
            (job,) = over(host, send(host, {**BODY, "seed": seed}))
            assert (job["state"], job["ranks"]) == ("done", 4)
            reference[seed] = pixels(host, job["id"]).astype(int)
        blocker = begun(host, LONG)
        jobs = [send(host, {**BODY, "seed": seed}) for seed in (0, 1)]
        fault_file.write_text("3 denoiser")
        done = over(host, blocker, *jobs)
        assert [job["state"] for job in done] == ["done"] * 3 and sum(job["attempts"] for job in done) == 4, host.log
        assert {job["ranks"] for job in done[1:]} <= {2, 4} and 2 in {job["ranks"] for job in done[1:]}
        for seed, job in enumerate(jobs):
            assert np.abs(pixels(host, job).astype(int) - reference[seed]).max() <= 1
        blocker = begun(host, LONG)
        done = over(host, blocker, *[send(host, {**BODY, "seed": seed % 2}) for seed in range(8)])
        assert [job["state"] for job in done] == ["done"] * 9 and 1 in {job["ranks"] for job in done}
        for seed, job in enumerate(done[1:]):
            assert np.abs(pixels(host, job["id"]).astype(int) - reference[seed % 2]).max() <= 1


@pytest.mark.slow
def test_throughput_mode_gives_each_rank_its_own_job_also_where_there_is_only_one(alone):
    with start_launcher(*ARGUMENTS, "--backend=distrifuser", "--nproc_per_node=2", "--mode=throughput") as host:
        host.wait_until_ready()
        done = over(host, *[send(host, {**BODY, "seed": seed}) for seed in range(3)])
        done += over(host, send(host, {**BODY, "seed": 3}))
        assert [(job["state"], job["ranks"]) for job in done] == [("done", 1)] * 4
        for seed, job in enumerate(done):
            assert np.abs(pixels(host, job["id"]).astype(int) - alone(seed)).max() <= (job["batch"] > 1)
        host.signal_and_wait(signal.SIGINT, within_s=10)
        assert "Traceback" not in host.log
