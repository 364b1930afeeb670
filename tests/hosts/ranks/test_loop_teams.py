"""Ranks that split into teams: how they end, more ranks, and teams at all times. What else they do
is in test_two_ranks.py.
"""

import signal

import psutil
import pytest

from tests.hosts.harness import READY_WITHIN_S, start_launcher, wait_until
from tests.hosts.sending import (
    ARGUMENTS,
    BODY,
    OneRank,
    begun,
    both_run,
    difference,
    over,
    pixels,
    send,
)

LONG = {**BODY, "num_inference_steps": 30}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def host():
    with start_launcher(*ARGUMENTS, "--backend=distrifuser", "--nproc_per_node=2") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def alone():
    return OneRank()


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
    assert [job["attempts"] for job in done] == [1, 2, 2, 1, 1]
    assert difference(pixels(host, jobs[3]), alone({**BODY, "seed": 3})) <= 1


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
