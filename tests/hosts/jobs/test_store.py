"""The job store: what a queue leaves on disk, and what the next one makes of it."""

import contextlib
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.errors import (
    BusyError,
    CancelledError,
    HostError,
    NotFoundError,
    RankError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from backends.generation.schedulers import SchedulerError
from hosts.jobs import serialization
from hosts.jobs.queue import JobStatus
from hosts.jobs.store import JobStore
from hosts.supervision.exit_reports import ExitReport
from tests.hosts.jobs.stored import StoppedClock, request, result, send


def test_request_comes_back_as_it_was():
    sample_image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    )
    asked = request(
        scheduler={"scheduler": "euler", "plain": {"tensors": []}},
        latents=np.ones((1, 4, 2, 2), np.float32), init_image=sample_image,
        control_image=[sample_image, sample_image.rotate(90)], sigmas=[1.0, 0.0], strength=0.5,
    )  # fmt: skip
    text, arrays = serialization.pack_request(asked)
    back = serialization.unpack_request(text, arrays.__getitem__)
    assert back.model_fields_set == asked.model_fields_set
    assert serialization.fingerprint(back) == serialization.fingerprint(asked)
    assert back.scheduler == asked.scheduler and back.sigmas == asked.sigmas
    assert (np.asarray(back.control_image[1]) == np.asarray(asked.control_image[1])).all()
    assert serialization.fingerprint(request(2)) != serialization.fingerprint(request(1))
    assert serialization.fingerprint(request(latents=np.zeros(3))) != serialization.fingerprint(
        request(latents=np.ones(3))
    )


@pytest.mark.parametrize(
    "error",
    [
        RankError("rank 1 failed: x", rank=1),
        RequestError("no", field="steps"),
        UnsupportedError("never", field="steps"),
        CancelledError("c"),
        HostError("h"),
    ],
)
def test_error_comes_back_as_it_was(error):
    back = serialization.unpack_error(serialization.pack_error(error))
    assert type(back) is type(error) and str(back) == str(error)
    assert getattr(back, "rank", None) == getattr(error, "rank", None) and getattr(
        back, "field", None
    ) == getattr(error, "field", None)


def test_error_of_a_kind_that_is_defined_elsewhere_comes_back_as_the_kind_that_it_is():
    packed = serialization.pack_error(SchedulerError("scheduler='x' is not a scheduler."))
    back = serialization.unpack_error(packed)
    assert (type(back), back.field) == (RequestError, "scheduler")
    left = packed.replace('"RequestError"', '"SchedulerError"')  # of an earlier version
    assert str(serialization.unpack_error(left)) == "scheduler='x' is not a scheduler."


def test_waiting_jobs_run_after_a_restart_in_their_order_with_the_seeds_they_had(open_queue):
    queue = open_queue()
    seeds = {(job := send(queue, None)).id: job.request.seed for _ in range(3)}
    queue = open_queue()
    assert [job.id for job in queue.jobs()] == list(seeds)
    for job_id, seed in seeds.items():
        job = queue.next()
        assert (job.id, job.request.seed, job.attempts) == (job_id, seed, 1)
        queue.finish(job, result=result())


def test_job_that_ran_is_begun_again_before_all_others_and_only_once(open_queue):
    queue = open_queue()
    jobs = [send(queue, seed, client=client) for seed, client in ((1, "a"), (2, "b"), (3, "a"))]
    assert queue.next().id == jobs[0].id
    queue = open_queue()
    assert queue.next().id == jobs[0].id
    JobStore.note(queue._store, ExitReport(why="rank 1 was gone", rank=1))
    queue = open_queue()
    again = queue.find(jobs[0].id)
    assert again.status is JobStatus.FAILED and again.finished.is_set()
    with pytest.raises(
        HostError,
        match=(
            r"ended 2 times while this job ran, so it is not tried again. The last time: rank 1 "
            r"was gone. Ask for"
        ),
    ):
        again.wait()
    assert queue.next().id == jobs[1].id
    queue = open_queue()
    assert queue.find(jobs[0].id).status is JobStatus.FAILED


def test_jobs_that_ran_at_once_are_begun_again_in_their_order(open_queue):
    queue = open_queue()
    jobs = [send(queue, seed) for seed in range(3)]
    for _ in range(2):
        queue.next(ranks=1)
    queue = open_queue()
    assert [queue.next().id for _ in jobs] == [job.id for job in jobs]


def test_last_report_are_those_of_the_last_process(open_queue):
    queue = open_queue()
    send(queue)
    queue.next()
    JobStore.note(queue._store, ExitReport(why="rank 1 was gone", rank=1))
    queue = open_queue()
    queue.next()
    queue = open_queue()
    assert "rank 0 ended without a reason" in str(queue.jobs()[0].error)


def test_result_of_before_the_restart_is_the_same_and_is_not_made_again(open_queue):
    queue = open_queue()
    job = send(queue)
    queue.finish(queue.next(), result=result(5))
    queue = open_queue()
    back = queue.find(job.id)
    assert back.status is JobStatus.DONE and queue.num_waiting == 0
    made, want = back.wait(), result(5)
    assert (made.frames == want.frames).all() and (made.latents == want.latents).all()
    assert (made.seed, made.report, made.resolved, made.exactness) == (
        5,
        want.report,
        want.resolved,
        "exact",
    )
    assert back.step == job.step and back.ended_s == job.ended_s


def test_kept_results_hold_no_files_open(open_queue):
    queue = open_queue()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        send(queue)
        queue.finish(queue.next(), result=result())
    queue = open_queue()
    assert sum(job.wait().frames.nbytes > 0 for job in queue.jobs()) == 10
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_failed_and_cancelled_jobs_stay_so(open_queue):
    queue = open_queue()
    failed, cancelled, stopped = send(queue), send(queue), send(queue)
    queue.finish(queue.next(), error=RankError("rank 1 failed: x", rank=1))
    queue.cancel(cancelled, "not wanted")
    queue.cancel(queue.next(), "changed my mind")  # and the ranks die before its next step
    queue = open_queue()
    assert queue.num_waiting == 0
    for job, match in (
        (failed, "rank 1 failed: x"),
        (cancelled, "not wanted"),
        (stopped, "changed my mind"),
    ):
        with pytest.raises(HostError, match=match):
            queue.find(job.id).wait()
    assert queue.find(stopped.id).status is JobStatus.CANCELLED


def test_jobs_that_were_not_to_be_stored_are_not(open_queue, tmp_path):
    queue = open_queue()
    queue.submit(request(), is_kept=True)
    queue.submit(request())
    assert open_queue().jobs() == []


def test_host_that_stops_leaves_its_jobs_to_the_next_at_no_cost(open_queue):
    for _ in range(3):
        queue = open_queue()
        if not queue.jobs():
            sent = [send(queue).id, send(queue, 2).id]
        job = queue.next()
        assert (job.id, job.attempts) == (sent[0], 1)
        queue.close(UnavailableError("stopping"), finish_running=True)
        assert not job.must_stop and not queue.wait_until_idle(0.01)
        queue.interrupt()
        assert job.must_stop
        queue.finish(job, error=CancelledError("at step 3"))
        assert not job.finished.is_set() and queue.wait_until_idle(0)
    queue = open_queue()
    queue.next()
    queue.close(UnavailableError("stopping"), finish_running=True)
    queue.interrupt()  # and is killed before the next step
    assert open_queue().next().attempts == 1


def test_job_that_ends_while_the_host_stops_is_done(open_queue):
    queue = open_queue()
    job = send(queue)
    queue.next()
    queue.close(UnavailableError("stopping"))
    queue.finish(job, result=result())
    assert open_queue().find(job.id).status is JobStatus.DONE


def test_ranks_that_are_lost_leave_the_running_job_running(open_queue):
    queue = open_queue()
    job, waiting = send(queue), send(queue)
    queue.next()
    queue.abandon(UnavailableError("lost"))
    assert not job.finished.is_set() and not waiting.finished.is_set(), (
        "a client that asks now would hear of a failure that is none"
    )
    assert queue.jobs() == [job, waiting], "the page would show the job as lost"
    queue = open_queue()
    assert [found.id for found in queue.jobs()] == [job.id, waiting.id]


def test_retried_job_comes_next_and_only_once(open_queue):
    queue = open_queue()
    first, second = send(queue, client="a"), send(queue, client="b")
    assert queue.next() is first
    assert queue.retry(first) and first.status is JobStatus.QUEUED
    assert queue.next() is first and first.attempts == 2
    assert not queue.retry(first)
    queue.finish(first, error=RankError("x", rank=1))
    assert queue.next() is second
    queue.cancel(second)
    assert not queue.retry(second), "a cancelled job was begun again"


def test_key_gives_the_same_job_also_after_a_restart(open_queue):
    queue = open_queue()
    job = send(queue, None, key="k", client="a")
    assert send(queue, None, key="k", client="a") is job and queue.num_waiting == 1
    assert send(queue, None, key="k", client="b") is not job
    queue = open_queue()
    again = send(queue, None, key="k", client="a")
    assert (again.id, again.request.seed) == (job.id, job.request.seed) and queue.num_waiting == 2
    with pytest.raises(
        RequestError,
        match=(
            f"Idempotency-Key='k' belongs to job '{job.id}', which asked for something else. "
            "Use "
            "a new key"
        ),
    ):
        send(queue, 77, key="k", client="a")


def test_key_is_free_once_its_job_is_forgotten(open_queue):
    queue = open_queue(num_kept=1)
    first = send(queue, key="k")
    send(queue)
    for _ in range(2):
        queue.finish(queue.next(), result=result())
    assert send(queue, key="k").id != first.id


@pytest.mark.parametrize("bounds", [{"num_kept": 2}, {"kept_bytes": 2 * (8 * 8 * 3 + 16)}])
def test_results_are_kept_within_bounds_and_their_files_go(bounds, open_queue, tmp_path):
    queue = open_queue(**bounds)
    jobs = [send(queue) for _ in range(4)]
    for _ in jobs:
        queue.finish(queue.next(), result=result())
    queue = open_queue(**bounds)
    assert [job.id for job in reversed(queue.jobs())] == [job.id for job in jobs[2:]]
    assert sorted(path.name for path in (tmp_path / "state" / "arrays").iterdir()) == sorted(
        f"{job.id}.result" for job in jobs[2:]
    )
    with pytest.raises(NotFoundError, match="there is no job"):
        queue.find(jobs[0].id)


def test_results_are_kept_for_their_time(open_queue):
    clock = StoppedClock()
    queue = open_queue(kept_seconds=3600, now=clock)
    job = send(queue)
    queue.finish(queue.next(), result=result())
    assert queue.find(job.id) is job
    clock.now_s += 3601
    with pytest.raises(NotFoundError):
        queue.find(job.id)
    assert open_queue().jobs() == []


def test_images_of_a_waiting_job_are_stored_and_go_when_it_is_over(open_queue, tmp_path):
    sample_image = Image.new("RGB", (8, 8), (1, 2, 3))
    queue = open_queue()
    job = queue.submit(request(init_image=sample_image), is_stored=True)
    queue = open_queue()
    assert queue.find(job.id).request.init_image.getpixel((0, 0)) == (1, 2, 3)
    queue.finish(queue.next(), result=result())
    assert [path.name for path in (tmp_path / "state" / "arrays").iterdir()] == [f"{job.id}.result"]


def test_refused_jobs_leave_no_arrays(open_queue, tmp_path):
    """All of them write theirs before the last place is taken."""
    queue = open_queue(capacity=1)
    sample_image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    )
    accepted = []

    def submit(number):
        with contextlib.suppress(BusyError):
            accepted.append(
                queue.submit(request(number, init_image=sample_image), is_stored=True).id
            )

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert [path.name for path in (tmp_path / "state" / "arrays").iterdir()] == [
        f"{job_id}.request" for job_id in accepted
    ]
    assert len(accepted) == 1


def test_disk_that_was_full_has_its_room_back(open_queue, tmp_path):
    queue = open_queue()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10_000, before[1])
    )  # larger files fail in the middle, as on a full disk
    try:
        with pytest.raises(UnavailableError, match="cannot be stored"):
            queue.submit(request(init_image=Image.new("RGB", (500, 500))), is_stored=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "state" / "arrays").iterdir())
    assert queue.submit(request(init_image=Image.new("RGB", (500, 500))), is_stored=True).id
