"""The queue between HTTP threads and the rank loop."""

import threading
import time

import numpy as np
import pytest

from backends.errors import BusyError, CancelledError, NotFoundError, RankError, UnavailableError
from backends.request import GenerateRequest, GenerateResult
from hosts.jobs.decision import Choice
from hosts.jobs.queue import JobQueue, JobStatus
from tests.hosts.jobs.stored import StoppedClock


def request(seed=1, **fields):
    return GenerateRequest(prompt="a cat", seed=seed, **fields)


def result(seed=1):
    frames = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    return GenerateResult(
        frames=frames, latents=None, seed=seed, num_steps=2, exactness="exact", seconds=0.1
    )


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


def test_jobs_that_cannot_be_compared_are_taken_in_their_order_and_one_by_one():
    queue = JobQueue()
    submitted = [queue.submit(request()) for _ in range(2)]

    def fails(waiting, running):
        raise RecursionError("of a request")

    assert queue.next(fails) is submitted[0]
    assert queue.take_along(submitted[0], fails) == []
    assert queue.next(fails) is submitted[1]


@pytest.mark.parametrize("jump_s", [86400.0, -86400.0])
def test_clock_of_the_machine_that_jumps_neither_cancels_nor_forgets_a_job(jump_s, monkeypatch):
    queue = JobQueue(max_seconds=600, kept_seconds=3600)
    jobs = [queue.submit(request(), is_kept=True) for _ in range(2)]
    queue.next()
    queue.finish(jobs[0], result=result())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    assert queue.find(jobs[0].id) is jobs[0]
    assert queue.next() is jobs[1]
    queue.finish(jobs[1], result=result())
    assert [job.status for job in jobs] == [JobStatus.DONE] * 2
    assert all(
        0 <= job.started_s - job.created_s <= job.ended_s - job.created_s < 60 for job in jobs
    )


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
    seen = [queue.percent()]
    for step in (1, 2, 1, 4):  # a late report must not turn it back
        queue.record_step(job, step, 4)
        seen.append(queue.percent())
    assert seen == [0, 25, 50, 50, 100]
    queue.finish(job, result=result())
    assert queue.percent() == 100
    queue.next()
    assert queue.percent() == 0


def test_progress_is_not_left_where_a_failed_job_stood():
    queue = JobQueue()
    queue.submit(request())
    job = queue.next()
    queue.record_step(job, 3, 4)
    queue.finish(job, error=RankError("rank 0 failed", rank=0))
    assert queue.percent() == 0


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
    assert running.must_stop and not running.cancel_requested
    with pytest.raises(UnavailableError, match="stopping"):
        waiting.wait()
    with pytest.raises(UnavailableError, match="stopping"):
        queue.submit(request())


def test_job_that_is_stopped_with_the_host_is_answered_with_the_hosts_reason():
    queue = JobQueue()
    running = queue.submit(request(), is_stored=True)
    queue.next()
    queue.close(UnavailableError("the host is stopping"))
    queue.finish(running, error=CancelledError("at step 3 of 9"))
    with pytest.raises(UnavailableError, match="the host is stopping"):
        running.wait()


def test_retried_job_is_begun_twice_and_not_three_times():
    queue = JobQueue()
    job = queue.submit(request())
    queue.submit(request())
    assert queue.next() is job and queue.retry(job)
    assert queue.next() is job and not queue.retry(job)
    queue.finish(job, error=RankError("rank 1 failed", rank=1))
    assert job.attempts == 2 and job.status is JobStatus.FAILED


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


def test_job_that_is_too_late_ends_as_cancelled_before_or_while_it_runs():
    clock = StoppedClock()
    queue = JobQueue(max_seconds=0.05, now=clock)
    waiting, running = queue.submit(request()), None
    clock.now_s += 0.1
    running = queue.submit(request())
    assert queue.next() is running
    assert waiting.status is JobStatus.CANCELLED and "--max_job_seconds" in str(waiting.error)
    assert not running.must_stop
    clock.now_s += 0.1
    assert running.must_stop
    queue.finish(running, error=CancelledError("at step 3 of 9"))
    assert "was not done 0.05 s after it was sent" in str(running.error)


def test_client_that_comes_back_has_no_lead_over_those_that_wait():
    queue = JobQueue()
    for _ in range(3):
        queue.submit(request(), client="a")
    queue.finish(queue.next(), result=result())
    late = queue.submit(request(), client="b")
    later = queue.submit(request(), client="b")
    order = [job.client for job in queue.jobs()]
    assert order == ["a", "b", "a", "b"]
    assert (queue.position(late), queue.position(later)) == (1, 3)


def test_kept_jobs_are_found_until_newer_ones_push_them_out():
    queue = JobQueue(num_kept=2)
    jobs = [queue.submit(request(), is_kept=True) for _ in range(3)]
    for _ in jobs:
        queue.finish(queue.next(), result=result())
    assert [queue.find(job.id) for job in jobs[1:]] == jobs[1:]
    with pytest.raises(NotFoundError, match="until 2 newer ones"):
        queue.find(jobs[0].id)
    with pytest.raises(NotFoundError):
        queue.find(queue.submit(request()).id)


def test_results_that_take_too_much_room_are_forgotten_first():
    queue = JobQueue(kept_bytes=400)
    jobs = [queue.submit(request(), is_kept=True) for _ in range(3)]
    for _ in jobs:
        queue.finish(queue.next(), result=result())
    assert queue.find(jobs[2].id) is jobs[2] and queue.find(jobs[1].id) is jobs[1]
    with pytest.raises(NotFoundError):
        queue.find(jobs[0].id)


def test_change_wakes_who_follows_the_job():
    queue = JobQueue()
    job = queue.submit(request())
    version = job.version
    assert queue.wait_for_change(job, version, 0.05) == version
    threading.Timer(0.1, queue.next).start()
    assert queue.wait_for_change(job, version, 10) > version


def test_jobs_submitted_together_are_seen_at_once():
    queue, seen = JobQueue(), []

    def choose(waiting, running):
        seen.append(len(waiting))
        return Choice.LEAVE if waiting else Choice.WAIT

    thread = threading.Thread(target=lambda: queue.next(choose))
    thread.start()
    with queue.together():
        for _ in range(3):
            queue.submit(request())
            time.sleep(0.02)
    thread.join(timeout=5)
    assert seen == [0, 3]


def test_several_jobs_run_at_once_and_the_oldest_gives_the_progress():
    queue = JobQueue()
    jobs = [queue.submit(request()) for _ in range(3)]
    first, second = queue.next(ranks=1), queue.next(ranks=1)
    assert (first.ranks, queue.position(jobs[2]), queue.jobs()) == (1, 2, jobs)
    queue.record_step(second, 3, 4)
    assert queue.percent() == 0
    queue.record_step(first, 1, 4)
    assert queue.percent() == 25
    queue.finish(first, result=result())
    assert queue.percent() == 75
    queue.finish(second, error=RankError("rank 1 failed", rank=1))
    assert queue.percent() == 0 and queue.wait_until_idle(0)


def test_host_that_stops_ends_all_running_jobs():
    queue = JobQueue()
    for _ in range(2):
        queue.submit(request())
    running = [queue.next(), queue.next()]
    queue.close(UnavailableError("stopping"))
    assert all(job.must_stop for job in running) and not queue.wait_until_idle(0)
    queue.abandon(UnavailableError("gone"))
    assert all(job.status is JobStatus.FAILED for job in running) and queue.wait_until_idle(0)


def test_taker_waits_and_leaves_as_it_chooses_and_is_asked_again_at_each_change():
    queue, asked, left = JobQueue(), [], []

    def choose(waiting, running):
        asked.append((list(waiting), list(running)))
        return Choice.WAIT if len(waiting) < 2 else Choice.LEAVE

    thread = threading.Thread(target=lambda: left.append(queue.next(choose)))
    thread.start()
    first, second = queue.submit(request()), queue.submit(request())
    thread.join(timeout=5)
    assert left == [None] and not queue.is_closed
    assert asked[-1] == ([first, second], []) and queue.num_waiting == 2
    assert queue.next(lambda waiting, running: Choice.TAKE) is first


def test_taker_that_lingers_is_asked_again_without_a_change():
    queue, choices = JobQueue(), [Choice.LINGER, Choice.LINGER, Choice.TAKE]
    job = queue.submit(request())
    assert queue.next(lambda waiting, running: choices.pop(0)) is job
    assert not choices


def test_full_queue_has_a_place_for_a_client_of_which_nothing_waits():
    queue = JobQueue(capacity=4)
    greedy = [queue.submit(request(), client="greedy") for _ in range(4)]
    with pytest.raises(BusyError):
        queue.submit(request(), client="greedy")
    polite = queue.submit(request(), client="polite")
    assert queue.next() is greedy[0] and queue.next() is polite
    queue.submit(request(), client="greedy")
    others = [queue.submit(request(), client=f"other {number}") for number in range(2)]
    for client in ("other 0", "other 2", "greedy"):
        with pytest.raises(BusyError, match="the queue is full: 6 jobs are waiting"):
            queue.submit(request(), client=client)
    assert len(others) == 2


def test_unknown_id_of_any_length_is_named_by_its_beginning():
    with pytest.raises(NotFoundError) as unknown:
        JobQueue().find("x" * 5000)
    assert "'xxx" in str(unknown.value) and len(str(unknown.value)) < 300
