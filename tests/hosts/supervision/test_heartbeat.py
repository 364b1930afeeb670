"""Ranks that hang: stopped for real, noticed by the one that is left, which ends with the reason
and takes the hanging one with it.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from hosts.supervision.heartbeat import Watch
from tests.hosts.harness import free_port

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, sys, time
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
from hosts.supervision.progress import Activity
from hosts.supervision.heartbeat import Watch
rank, port = int(os.environ["RANK"]), int(sys.argv[1])
store = TCPStore(
    "127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False
)
beats = PrefixStore("watch", store.clone())
activity = Activity()
def leave(ending):
    print(f"{ending.rank}: {ending.why}", flush=True)
Watch(beats, rank=rank, world_size=2, timeout_s=2, activity=activity, on_leave=leave).start()
print("watching", flush=True)
if sys.argv[2:]:
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    # a job of which rank 1 makes three steps and no fourth, for which rank 0 then waits
    activity.begin("job 7", within_s=1)
    for _ in range(3):
        time.sleep(0.1)
        activity.step(is_last=False)
    if rank == 0:
        dist.broadcast(torch.zeros(1), src=1)
time.sleep(100)
"""


def start_two(program, *arguments):
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        (0, "0: the rendezvous store in rank 0 has not answered for 2 s"),
        pytest.param(1, "1: rank 1 has sent no heartbeat for 2 s", marks=pytest.mark.slow),
    ],
)
def test_rank_that_hangs_is_noticed_by_the_other(stopped, said):
    ranks = start_two(PROGRAM, str(free_port()))
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["watching\n"] * 2
        with pytest.raises(subprocess.TimeoutExpired):
            ranks[1 - stopped].wait(timeout=4)
        ranks[stopped].send_signal(signal.SIGSTOP)
        assert ranks[1 - stopped].wait(timeout=20) == 70
        assert ranks[1 - stopped].stdout.read().strip() == said
        assert ranks[stopped].wait(timeout=5) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_machine_that_is_paused_loses_no_rank():
    ranks = start_two(PROGRAM, str(free_port()))
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["watching\n"] * 2
        time.sleep(2)
        for number, pause_s in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
            for rank in ranks:
                rank.send_signal(number)
            time.sleep(pause_s)
        for rank in ranks:
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(timeout=3)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_rank_whose_job_makes_no_step_while_its_threads_run_is_found_and_named():
    ranks = start_two(PROGRAM, str(free_port()), "job")
    try:
        ended = [rank.communicate(timeout=40) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [70, -signal.SIGKILL], ended
        said = {
            line.rpartition(" for ")[0]
            for out, _ in ended
            for line in out.splitlines()
            if line != "watching"
        }
        assert said == {"1: rank 1 has made no step of job 7 after step 3"}
    finally:
        for rank in ranks:
            rank.kill()


STARTING = """
import threading, time
from hosts.supervision import parent_watch
parent_watch.START_WITHIN_S = 1.5
threading.Thread(target=parent_watch._limit_start, daemon=True).start()
print("starting", flush=True)
time.sleep(100)
"""


def test_rank_that_hangs_before_the_ranks_have_met_is_ended_by_the_other():
    ranks = start_two(STARTING)
    try:
        ranks[0].stdout.readline()
        ranks[0].send_signal(signal.SIGSTOP)
        assert ranks[1].wait(timeout=20) == 70
        assert ranks[0].wait(timeout=5) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_rank_whose_gpu_is_busy_waits_for_others_and_the_idle_one_is_named():
    """On GPUs ranks wait in kernels, wherever their main threads are: here in this test, which is
    no file of collectives.
    """
    store = HashStore()
    busy, idle = (
        Watch(
            store, rank=rank, world_size=2, timeout_s=5, is_device_busy=lambda rank=rank: rank == 0
        )
        for rank in range(2)
    )
    with ThreadPoolExecutor(2) as pool:
        endings = list(
            pool.map(lambda watch: watch._who_is_stuck("made no step of job 7"), (busy, idle))
        )
    assert {(ending.rank, ending.why) for ending in endings} == {
        (1, "rank 1 has made no step of job 7")
    }
