"""What the gateway has started ends with it, also what no longer belongs to its family."""

import contextlib
import subprocess
import sys

import psutil
import pytest

from tests.hosts.harness import REPOSITORY, wait_until

GATEWAY = """
import subprocess, sys, time
from hosts.cluster import reaper
watcher = reaper.start()
helper = subprocess.Popen(["sleep", "60"], start_new_session=True)
time.sleep(1.5)
if sys.argv[1] == "complete":
    reaper.cluster_is_complete(watcher)
print(helper.pid, watcher.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["complete", "while it is started"])
def test_helpers_of_a_killed_gateway_are_killed(when):
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY, when], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as gateway:
        helper, watcher = (
            psutil.Process(int(number)) for number in gateway.stdout.readline().split()
        )
        try:
            assert helper.is_running() and watcher.is_running()
            gateway.kill()
            wait_until(
                lambda: not is_alive(helper) and not is_alive(watcher),
                within_s=10,
                what="both are gone",
            )
        finally:
            for process in (helper, watcher):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def is_alive(process):
    """One that init has not collected yet is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
