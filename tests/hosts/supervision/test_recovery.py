"""What is left of a host's jobs when the whole host goes: killed, told to stop, started again with
the same --state_dir.
"""

import fcntl
import io
import os
import signal

import numpy as np
import pytest
from PIL import Image

from hosts.supervision.temp_folder import ALIVE, PREFIX, remove_leftovers
from tests.checkpoints import checkpoint
from tests.hosts.harness import start_launcher, wait_until

BODY = {"prompt": "a red car", "num_inference_steps": 2, "seed": 5}


def start(folder, *arguments):
    return start_launcher(
        *arguments,
        "--type=sdxl",
        f"--checkpoint={checkpoint('sdxl')}",
        "--height=64",
        "--width=64",
        f"--state_dir={folder}",
    )


def send(host, body, **headers):
    return host.session.post(host.url("/v1/jobs"), json=body, headers=headers, timeout=20).json()


def state(host, job):
    return host.get(f"/v1/jobs/{job['id']}").json()


def wait_for(host, job, name):
    wait_until(
        lambda: state(host, job)["state"] == name, within_s=60, what=f"job {job['id']} is {name}"
    )
    return state(host, job)


def sample_image(host, job):
    return np.asarray(Image.open(io.BytesIO(host.get(f"/v1/jobs/{job['id']}/result").content)))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_jobs_outlive_a_killed_and_a_stopped_host(tmp_path):
    folder = tmp_path / "state"
    with start(folder) as host:
        host.wait_until_ready()
        done = send(host, BODY, **{"Idempotency-Key": "mine"})
        wait_for(host, done, "done")
        drawn = sample_image(host, done)
        running = send(host, {**BODY, "num_inference_steps": 900})
        waiting = send(host, {**BODY, "prompt": "a blue car"})
        wait_for(host, running, "running")
        host.session.close()
        host.signal_and_wait(signal.SIGKILL, within_s=3)
    with start(folder) as host:
        host.wait_until_ready()
        assert (sample_image(host, done) == drawn).all()
        assert send(host, BODY, **{"Idempotency-Key": "mine"})["id"] == done["id"]
        wait_until(lambda: state(host, running)["step"] > 0, within_s=60, what="the job runs again")
        assert state(host, running)["attempts"] == 2 and state(host, waiting)["position"] == 1
        host.session.close()
        host.signal_and_wait(signal.SIGTERM, within_s=10)
    with start(folder) as host:
        host.wait_until_listening()
        facts = state(host, running)
        assert (facts["state"], facts["attempts"], facts["seconds"]) == ("queued", 1, None), (
            "stopping the host cost it an attempt"
        )
        host.session.delete(host.url(f"/v1/jobs/{running['id']}"), timeout=20)
        assert wait_for(host, waiting, "done")["attempts"] == 1
        assert state(host, running)["state"] == "cancelled"
        assert (sample_image(host, waiting) != drawn).any()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_spare_takes_the_place_of_a_killed_rank_and_another_spare_comes(tmp_path):
    def spares():
        ranks = [process.pid for process in host.ranks().values()]
        return [process for process in host.tree()[2:] if process.pid not in ranks]

    with start(tmp_path / "state", "--spare_ranks=true", "--backend=single") as host:
        host.wait_until_ready()
        drawn = host.post(BODY).json()["output"]
        for number in range(2):
            wait_until(lambda: len(spares()) == 1, within_s=90, what="a spare waits")
            spare = spares()[0]
            if number:
                spare.kill()  # one that is gone does no harm
            host.ranks()[0].kill()
            wait_until(lambda: host.status() != 200, within_s=30, what="the rank is gone")
            host.wait_until_ready()
            assert (host.ranks()[0].pid == spare.pid) is (number == 0)
            assert host.post(BODY).json()["output"] == drawn


def test_folders_of_dead_launchers_are_removed_and_no_others(tmp_path):
    names = ("dead", "young", "alive")
    for name in names:
        (tmp_path / f"{PREFIX}{name}" / "state").mkdir(parents=True)
        (tmp_path / f"{PREFIX}{name}" / ALIVE).touch()
        os.utime(tmp_path / f"{PREFIX}{name}", (0, 0) if name != "young" else None)
    (tmp_path / "somebody-elses").mkdir()
    with (tmp_path / f"{PREFIX}alive" / ALIVE).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{PREFIX}alive",
        f"{PREFIX}young",
        "somebody-elses",
    ]


@pytest.mark.timeout(20)
def test_pipe_of_another_program_does_not_make_a_launcher_wait(tmp_path):
    strange = tmp_path / f"{PREFIX}x"
    strange.mkdir()
    os.mkfifo(strange / ALIVE)
    remove_leftovers(tmp_path)


def test_folder_of_another_user_stays(tmp_path, monkeypatch):
    theirs = tmp_path / f"{PREFIX}x"
    theirs.mkdir()
    (theirs / ALIVE).touch()
    os.utime(theirs, (0, 0))
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    remove_leftovers(tmp_path)
    assert theirs.exists()
    monkeypatch.setattr(os, "getuid", lambda: own)
    remove_leftovers(tmp_path)
    assert not theirs.exists()
