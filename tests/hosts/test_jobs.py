"""The queue between HTTP threads and the rank loop."""

import threading

import numpy as np
import pytest

from backends.errors import BusyError, CancelledError, RankError, UnavailableError
from backends.request import GenerateRequest, GenerateResult
from hosts.jobs import JobQueue, JobStatus


def request(seed=1, **fields):
    return GenerateRequest(prompt="a cat", seed=seed, **fields)


def result(seed=1):
    frames = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    return GenerateResult(frames=frames, latents=None, seed=seed, num_steps=2, exactness="exact", seconds=0.1)


def test_jobs_run_in_the_order_they_came():
    queue = JobQueue()
    submitted = [queue.submit(request()) for _ in range(3)]
    taken = []
    for _ in submitted:
        job = queue.next()
        assert job.status is JobStatus.RUNNING
        taken.append(job)
        queue.finish(job, result=result())
    assert taken == submitted
    assert len({job.id for job in submitted}) == 3


def test_ids_of_two_hosts_differ():
    assert JobQueue().submit(request()).id != JobQueue().submit(request()).id


def test_job_beyond_the_capacity_is_refused():
    queue = JobQueue(capacity=2)
    queue.submit(request())
    queue.submit(request())
    with pytest.raises(BusyError, match="the queue is full: 2 jobs are waiting"):
        queue.submit(request())
    assert queue.num_waiting == 2


def test_running_job_takes_no_place_in_the_queue():
    queue = JobQueue(capacity=1)
    queue.submit(request())
    queue.next()
    queue.submit(request())
    assert queue.num_waiting == 1


def test_next_waits_for_a_job():
    queue = JobQueue()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.next()))
    thread.start()
    job = queue.submit(request())
    thread.join(timeout=5)
    assert taken == [job]


def test_wait_gives_the_result_or_raises_the_error():
    queue = JobQueue()
    good, bad = queue.submit(request()), queue.submit(request())
    made = result()
    queue.finish(queue.next(), result=made)
    queue.finish(queue.next(), error=RankError("rank 1 failed: x", rank=1))
    assert good.wait() is made and good.status is JobStatus.DONE
    with pytest.raises(RankError, match="rank 1 failed"):
        bad.wait()
    assert bad.status is JobStatus.FAILED


@pytest.mark.parametrize("seed", [None, -1, -5])
def test_seed_left_open_is_drawn_anew_for_each_job(seed):
    queue = JobQueue()
    seeds = {queue.submit(request(seed)).request.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= drawn < 2**32 for drawn in seeds)


def test_given_seed_is_kept():
    assert JobQueue().submit(request(0)).request.seed == 0


def test_progress_rises_within_a_job_and_starts_at_zero_with_the_next():
    queue = JobQueue()
    queue.submit(request())
    queue.submit(request())
    job = queue.next()
    seen = [queue.percent]
    for step in (1, 2, 1, 4):  # a late report must not turn it back
        queue.record_step(job, step, 4)
        seen.append(queue.percent)
    assert seen == [0, 25, 50, 50, 100]
    queue.finish(job, result=result())
    assert queue.percent == 100
    queue.next()
    assert queue.percent == 0


def test_progress_is_not_left_where_a_failed_job_stood():
    queue = JobQueue()
    queue.submit(request())
    job = queue.next()
    queue.record_step(job, 3, 4)
    queue.finish(job, error=RankError("rank 0 failed", rank=0))
    assert queue.percent == 0


def test_cancelled_waiting_job_never_runs():
    queue = JobQueue()
    first, second = queue.submit(request()), queue.submit(request())
    queue.cancel(first)
    assert first.status is JobStatus.CANCELLED
    with pytest.raises(CancelledError, match="before it ran"):
        first.wait()
    assert queue.next() is second


def test_cancelled_running_job_is_told_and_ends_as_cancelled():
    queue = JobQueue()
    queue.submit(request())
    job = queue.next()
    queue.cancel(job)
    assert job.cancel_requested and job.status is JobStatus.RUNNING
    queue.finish(job, error=CancelledError("the job was cancelled at step 1 of 4."))
    assert job.status is JobStatus.CANCELLED


def test_closed_queue_refuses_fails_and_cancels_with_its_reason():
    queue = JobQueue()
    running, waiting = queue.submit(request()), queue.submit(request())
    queue.next()
    queue.close(UnavailableError("the host is stopping"))
    assert queue.next() is None
    assert running.cancel_requested
    with pytest.raises(UnavailableError, match="stopping"):
        waiting.wait()
    with pytest.raises(UnavailableError, match="stopping"):
        queue.submit(request())


def test_first_reason_for_closing_stays():
    queue = JobQueue()
    queue.close(UnavailableError("loading failed"))
    queue.close(UnavailableError("stopping"))
    with pytest.raises(UnavailableError, match="loading failed"):
        queue.submit(request())


def test_close_wakes_the_rank_loop():
    queue = JobQueue()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.next()))
    thread.start()
    queue.close(UnavailableError("stopping"))
    thread.join(timeout=5)
    assert taken == [None]


def test_abandoned_queue_answers_for_the_running_job_too():
    queue = JobQueue()
    running = queue.submit(request())
    queue.next()
    queue.abandon(UnavailableError("the ranks are gone"))
    with pytest.raises(UnavailableError, match="the ranks are gone"):
        running.wait()


def test_job_that_is_over_keeps_its_first_outcome():
    queue = JobQueue()
    job = queue.submit(request())
    queue.next()
    made = result()
    queue.finish(job, result=made)
    queue.abandon(UnavailableError("late"))
    assert job.wait() is made
