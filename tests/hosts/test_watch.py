"""Ranks that hang: stopped for real, noticed by the one that is left, which ends with the reason and takes the hanging one with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.harness import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
from hosts.control import Watch
rank, port = int(os.environ["RANK"]), int(sys.argv[1])
store = TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False)
beats = PrefixStore("watch", store.clone())
Watch(beats, rank=rank, world_size=2, timeout_s=2, on_leave=lambda why: print(why, flush=True)).start()
print("watching", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("stopped", "said"),
    [
        (0, "the rendezvous store in rank 0 has not answered for 2 s"),
        pytest.param(1, "rank 1 has given no sign of life for 2 s", marks=pytest.mark.slow),
    ],
)
def test_rank_that_hangs_is_noticed_by_the_other(stopped, said):
    port = free_port()
    command = [sys.executable, "-c", PROGRAM, str(port)]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for rank in range(2)
    ]
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


STARTING = """
import threading, time
from hosts import lifeline
lifeline.START_WITHIN_S = 1.5
threading.Thread(target=lifeline._limit_start, daemon=True).start()
print("starting", flush=True)
time.sleep(100)
"""


def test_rank_that_hangs_before_the_ranks_have_met_is_ended_by_the_other():
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STARTING],
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        ranks[0].stdout.readline()
        ranks[0].send_signal(signal.SIGSTOP)
        assert ranks[1].wait(timeout=20) == 70
        assert ranks[0].wait(timeout=5) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
