"""Ranks that are lost while they work on a job, by a real hang and by real kills: it runs again
once, then says why it failed.
"""

import pytest

from tests.checkpoints import checkpoint
from tests.hosts.harness import start_launcher, wait_until

PROMPT = "a most secret castle"
BODY = {"prompt": PROMPT, "num_inference_steps": 900, "seed": 5, "scheduler": "euler"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "next"


@pytest.fixture(scope="module")
def host(fault_file):
    arguments = (
        "--type=sdxl",
        f"--checkpoint={checkpoint('sdxl')}",
        "--nproc_per_node=2",
        "--mode=latency",
        "--backend=distrifuser",
    )
    arguments += ("--height=64", "--width=64", "--failure_timeout=4")
    with start_launcher(*arguments, environment={"FAULT_FILE": str(fault_file)}) as running:
        running.wait_until_ready()
        yield running


def state(host, job):
    return host.get(f"/v1/jobs/{job['id']}").json()


def wait_for(host, job, condition, what):
    def holds():
        return host.status() == 200 and condition(state(host, job))

    wait_until(holds, within_s=120, what=f"{what}\n{host.log[-3000:]}", every_s=0.2)
    return state(host, job)


def send(host, steps):
    return host.session.post(
        host.url("/v1/jobs"), json={**BODY, "num_inference_steps": steps}, timeout=20
    ).json()


def test_step_that_never_ends_while_all_threads_run_is_noticed_and_its_job_runs_again(
    host, fault_file
):
    sent = send(host, 300)
    wait_for(host, sent, lambda job: job["step"] > 5, "the job runs")
    old = host.ranks()
    fault_file.write_text("1 hang")
    wait_until(
        lambda: not any(process.is_running() for process in old.values()),
        within_s=40,
        what="the old ranks are gone",
    )
    over = wait_for(host, sent, lambda job: job["state"] == "done", "the job is done")
    assert (over["attempts"], over["step"]) == (2, 300)
    assert "rank 1 has made no step of job" in host.log and "sitecustomize.py" in host.log


def test_job_whose_rank_is_killed_twice_fails_with_the_signal_and_the_last_lines_of_its_log(host):
    sent = send(host, 900)
    for attempt in (1, 2):
        wait_for(
            host,
            sent,
            lambda job, attempt=attempt: job["attempts"] == attempt and job["step"] > 3,
            f"attempt {attempt} runs",
        )
        host.ranks()[1].kill()
        wait_until(lambda: host.status() == 0, within_s=30, what="the ranks end")
    over = wait_for(host, sent, lambda job: job["state"] == "failed", "it is given up")
    assert over["error"].startswith(
        "the ranks ended 2 times while this job ran, so it is not tried again. The last time: rank "
        "1 was killed by SIGKILL"
    )
    assert (
        "The last lines of the log of rank 1:\n" in over["error"]
        and f"[{sent['id']}]: job {sent['id']} begins" in over["error"]
    )
    assert PROMPT not in over["error"] and PROMPT not in host.log
    assert len(over["error"]) < 2500


def test_job_that_crashes_its_rank_fails_at_once_and_the_ones_behind_it_are_done(host, fault_file):
    fault_file.write_text("1 crash\n1 crash")
    sent, waiting = send(host, 20), send(host, 2)
    over = wait_for(host, sent, lambda job: job["state"] == "failed", "it is given up")
    assert over["attempts"] == 1 and over["error"].startswith(
        "this job ended a rank, so it is not tried again: rank 1 was killed by SIGSEGV"
    )
    assert "Segmentation fault" in over["error"] and "in strike" in over["error"]
    assert fault_file.read_text() == "1 crash"
    fault_file.write_text("")
    over = wait_for(host, waiting, lambda job: job["state"] == "done", "the other one is done")
    assert (over["attempts"], over["step"]) == (1, 2)


def test_failure_of_the_middle_one_of_three_ranks_is_answered_by_name_and_the_next_image_is_right(
    fault_file,
):
    arguments = (
        "--type=sdxl",
        f"--checkpoint={checkpoint('sdxl')}",
        "--nproc_per_node=3",
        "--mode=latency",
        "--backend=distrifuser",
    )
    with start_launcher(
        *arguments,
        "--no_split_batch",
        "--height=96",
        "--width=64",
        environment={"FAULT_FILE": str(fault_file)},
    ) as host:
        host.wait_until_ready()
        body = {**BODY, "num_inference_steps": 4}
        want = host.post(body).json()["output"]
        fault_file.write_text("1 denoiser\n1 denoiser")
        answer = host.post(body)
        assert (answer.status_code, answer.json()["message"]) == (
            500,
            "rank 1 failed: ArithmeticError: a fault of the test in denoiser",
        )
        assert host.post(body).json()["output"] == want
