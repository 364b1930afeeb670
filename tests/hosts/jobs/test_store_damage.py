"""The job store when what is on the disk is damaged. Processes are killed for real
in the last test.
"""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.errors import ConfigError, HostError, UnavailableError
from hosts.jobs import database
from hosts.jobs.store import JobStore
from tests.hosts.jobs.stored import request, result, send

ROOT = Path(__file__).resolve().parents[3]


def test_arrays_without_a_job_are_removed(open_queue, tmp_path):
    queue = open_queue()
    for name in ("x-1.request", "x-1.result.new"):
        (tmp_path / "state" / "arrays" / name).mkdir()
    queue = open_queue()
    assert list((tmp_path / "state" / "arrays").iterdir()) == [] and queue.jobs() == []


def test_job_whose_images_are_gone_fails_and_the_others_run(open_queue, tmp_path):
    queue = open_queue()
    bad = queue.submit(request(init_image=Image.new("RGB", (8, 8))), is_stored=True)
    good, done = send(queue), send(queue)
    queue.cancel(done)
    (tmp_path / "state" / "arrays" / f"{bad.id}.request" / "init_image.npy").write_bytes(
        b"no array"
    )
    queue = open_queue()
    with pytest.raises(
        HostError, match=r"what was stored of this job cannot be read any more. Send it again."
    ):
        queue.find(bad.id).wait()
    assert queue.next().id == good.id


def test_truncated_result_is_an_error_and_no_crash(open_queue, tmp_path):
    queue = open_queue()
    job = send(queue)
    queue.finish(queue.next(), result=result(side=64))
    file = tmp_path / "state" / "arrays" / f"{job.id}.result" / "frames.npy"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(HostError, match="cannot be read any more"):
        open_queue().find(job.id).wait()


def test_array_file_is_never_unpickled(open_queue, tmp_path):
    queue = open_queue()
    job = queue.submit(request(init_image=Image.new("RGB", (8, 8))), is_stored=True)
    np.save(
        tmp_path / "state" / "arrays" / f"{job.id}.request" / "init_image.npy",
        np.array([{}], dtype=object),
        allow_pickle=True,
    )
    with pytest.raises(HostError, match="cannot be read any more"):
        open_queue().find(job.id).wait()


def _damage_header(path):
    path.write_bytes(b"no database at all" + path.read_bytes()[18:])


def _damage_pages(path):
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4 // 4096 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)


def _damage_tables(path):
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE jobs RENAME TO other")
        connection.execute("CREATE TABLE jobs (name)")


@pytest.mark.parametrize(
    ("damage", "at_least"), [(_damage_header, 0), (_damage_pages, 10), (_damage_tables, 0)]
)
def test_damaged_store_is_moved_aside_and_what_can_be_read_goes_on(
    damage, at_least, open_queue, tmp_path, caplog
):
    queue = open_queue()
    sent = [send(queue, seed).id for seed in range(48)]
    queue._store.close()
    damage(tmp_path / "state" / "jobs.sqlite")
    queue = open_queue()
    left = [job.id for job in queue.jobs()]
    assert at_least <= len(left) < len(sent) and left == [
        job_id for job_id in sent if job_id in left
    ]
    assert (
        "was damaged" in caplog.text and f"and {len(left)} jobs in it could be read" in caplog.text
    )
    assert [path.name for path in tmp_path.glob("state/damaged-*/jobs.sqlite")] == ["jobs.sqlite"]
    assert send(queue).id in [job.id for job in open_queue().jobs()]


def mark_version(connection, version):
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute(f"PRAGMA application_id = {database.APPLICATION + version}")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_store_of_the_first_version_is_taken_over(is_damaged, open_queue, tmp_path):
    queue = open_queue()
    job = send(queue)
    queue._store.close()
    path = tmp_path / "state" / "jobs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE jobs DROP COLUMN owner")
        mark_version(connection, 1)
    connection.close()
    if is_damaged:
        with path.open("r+b") as file:
            file.seek(60)  # the version
            file.write(b"\x07")
    back = open_queue().find(job.id)
    assert (back.owner, back.request.prompt) == ("", "a cat")
    assert len(list(tmp_path.glob("state/damaged-*"))) == is_damaged
    assert open_queue().find(job.id).id == job.id


def test_store_of_a_later_version_is_refused(open_queue, tmp_path):
    open_queue()._store.close()
    with sqlite3.connect(tmp_path / "state" / "jobs.sqlite") as connection:
        mark_version(connection, 3)
    with pytest.raises(
        ConfigError,
        match=(
            r"was written by a later version of this program \(tables 3, here 2\). Use another "
            r"folder"
        ),
    ):
        open_queue()


def test_store_in_use_is_refused(open_queue, tmp_path):
    open_queue()
    program = (
        "from hosts.jobs import store; store.LOCK_PATIENCE_S = 0; "
        f"store.JobStore(store.Path({str(tmp_path / 'state')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (
        "is in use by another host. Give each host a folder of its own."
        in done.stderr.splitlines()[-1]
    )


def test_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError,
        match=(
            r"--state_dir=.*/file cannot be used \(File exists\). Give a folder that this user "
            r"may write"
        ),
    ):
        JobStore(tmp_path / "file")


def test_full_disk_refuses_new_jobs_and_lets_accepted_ones_end(open_queue, caplog):
    queue = open_queue()
    job = send(queue)
    queue._store._database._connection.execute(
        "PRAGMA max_page_count = "
        f"{queue._store._database._connection.execute('PRAGMA page_count').fetchone()[0]}"
    )
    with pytest.raises(
        UnavailableError,
        match=(
            r"the job cannot be stored: database or disk is full. Try again later; the operator "
            r"must look at"
        ),
    ):
        for _ in range(40):
            queue.submit(request(prompt_embeds=None, negative_prompt="x" * 4000), is_stored=True)
    num_waiting = queue.num_waiting
    queue.finish(queue.next(), result=result())
    assert job.wait().seed == 1 and queue.num_waiting == num_waiting - 1


def test_folder_is_for_its_user_alone(open_queue, tmp_path):
    open_queue()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.timeout(850)
@pytest.mark.parametrize("rounds", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_killed_at_any_moment_no_job_is_lost_and_none_has_two_images(rounds, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.hosts.jobs.store_killer",
        str(tmp_path / "state"),
        str(rounds),
        "8",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["accepted"] > rounds and outcome["begun_twice"] > 0, outcome
    assert outcome["done"] >= outcome["accepted"] - outcome["failed"], outcome
    never = (
        "lost",
        "wrong_images",
        "different_images",
        "done_and_failed",
        "begun_more_often",
        "same_key_twice",
        "failed_with_other_reasons",
    )
    assert not {name: outcome[name] for name in never if outcome[name]}, outcome
