"""A disk that is full for a while costs nothing that was accepted."""

import contextlib
import resource
import threading
import time

import numpy as np
import pytest

from backends.errors import UnavailableError
from hosts.jobs import store
from hosts.jobs.job import JobStatus
from tests.hosts.jobs.stored import request, result, send

SIDE = 64
"""Of images that do not fit on a full disk."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(store, "DISK_PATIENCE_S", 0.0, raising=False)
    monkeypatch.setattr(store, "RETRY_S", 0.05, raising=False)


@contextlib.contextmanager
def full_disk(limit=4096):
    """Files cannot grow beyond `limit` bytes: larger ones fail in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def facts(job):
    return job.id, job.status, job.attempts


def test_result_that_could_not_be_stored_is_stored_once_there_is_room(open_queue, caplog):
    queue = open_queue()
    job = send(queue)
    with full_disk():
        queue.finish(queue.next(), result=result(side=SIDE))
        assert (job.wait().frames == result(side=SIDE).frames).all()
    wait_until(lambda: "stored again" in caplog.text)
    (kept,) = open_queue().jobs()
    assert kept.status is JobStatus.DONE and kept.ended_s == job.ended_s
    assert (kept.result.frames == job.result.frames).all()


def test_job_whose_result_was_never_stored_runs_again(open_queue):
    """It is not lost: no row says `done` before its images are there."""
    queue = open_queue()
    job = send(queue)
    running = queue.next()
    with full_disk():
        queue.finish(running, result=result(side=SIDE))
        queue._store.close()  # as if rank 0 had been killed
    queue = open_queue()
    (kept,) = queue.jobs()
    assert facts(kept) == (job.id, JobStatus.QUEUED, 1)
    assert queue.next() is kept and kept.request.seed == 1


@pytest.mark.parametrize("begins", ["before", "while"])
def test_client_sees_a_result_that_a_brief_lack_of_room_delays_only_once_it_is_stored(
    begins, open_queue, monkeypatch
):
    """Also if the row of its beginning could not be stored either."""
    monkeypatch.setattr(store, "DISK_PATIENCE_S", 30.0)
    queue = open_queue()
    job = send(queue)
    if begins == "before":
        queue.next()
    with full_disk():
        running = queue._running[0] if queue._running else queue.next()
        ending = threading.Thread(
            target=queue.finish, args=(running,), kwargs={"result": result(side=SIDE)}
        )
        ending.start()
        assert job.wait(timeout_s=0.5) is None
    assert job.wait(timeout_s=20) is not None
    ending.join()
    (kept,) = open_queue().jobs()
    assert kept.status is JobStatus.DONE


def test_results_after_the_first_do_not_wait_for_room(open_queue, monkeypatch):
    """A disk can be full for hours."""
    queue = open_queue()
    for seed in (1, 2):
        send(queue, seed)
    with full_disk():
        queue.finish(queue.next(), result=result(1, side=SIDE))
        monkeypatch.setattr(store, "DISK_PATIENCE_S", 600.0)
        queue._store._unwritten_since_s -= 601
        queue.finish(queue.next(), result=result(2, side=SIDE))
    wait_until(lambda: not queue._store._unwritten)
    assert [job.result.seed for job in open_queue().jobs()] == [2, 1]


def test_changes_of_a_row_are_written_later_in_their_order(open_queue):
    queue = open_queue()
    jobs = [send(queue, seed) for seed in (1, 2, 3)]
    with full_disk():
        running = queue.next()
        queue.cancel(jobs[1], "not wanted")
        queue.retry(running)
        queue.finish(queue.next(), error=UnavailableError("gone"))
        queue.forget(jobs[2])
    wait_until(lambda: not queue._store._unwritten)
    found = {job.id: job for job in open_queue().jobs()}
    assert {name: job.status for name, job in found.items()} == {
        jobs[0].id: JobStatus.FAILED,
        jobs[1].id: JobStatus.CANCELLED,
    }
    assert found[jobs[0].id].attempts == 2 and str(found[jobs[1].id].error) == "not wanted"


def test_job_that_is_forgotten_before_its_result_is_stored_stays_so(open_queue, tmp_path):
    queue = open_queue()
    job = send(queue)
    with full_disk():
        queue.finish(queue.next(), result=result(side=SIDE))
        queue.forget(job)
    wait_until(lambda: not queue._store._unwritten)
    assert not list((tmp_path / "state" / "arrays").iterdir())
    assert not open_queue().jobs()


def test_forgetting_makes_room_also_where_the_row_cannot_be_removed(open_queue, tmp_path):
    queue = open_queue()
    job = send(queue)
    queue.finish(queue.next(), result=result(side=SIDE))
    with full_disk():
        queue.forget(job)
        assert not list((tmp_path / "state" / "arrays").iterdir())
        queue._store.close()
    assert [job.error is not None for job in open_queue().jobs()] in ([], [True])


def test_store_opens_on_a_full_disk_and_its_jobs_go_on(open_queue):
    queue = open_queue()
    done, waiting = send(queue, 1), send(queue, 2)
    queue.finish(queue.next(), result=result(1, side=SIDE))
    queue._store.close()
    with full_disk(limit=1):
        queue = open_queue()
        assert np.array_equal(queue.find(done.id).result.frames, done.result.frames)
        assert queue.next().id == waiting.id
        with pytest.raises(UnavailableError, match="cannot be stored"):
            send(queue, 3)
    with contextlib.suppress(UnavailableError):
        queue.submit(request(4), is_stored=True)
