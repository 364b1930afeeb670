"""Which jobs are begun again after the ranks have ended, by what is known of their end."""

import signal
from functools import partial

import pytest

from hosts.jobs.job import JobStatus
from hosts.supervision.exit_reports import UNKNOWN, ExitReport, RankNotes
from hosts.supervision.parent_watch import EXIT_LOST_RANK
from tests.hosts.jobs.stored import send

SEEN = ExitReport(why="rank 1 was gone", rank=1, is_seen_only=True)
KILLED, CRASHED, ABORTED = -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT


def after(open_queue, tmp_path, *, exits, works, seen=SEEN, attempts=1):
    """Two jobs that run when the ranks end, as the next process finds them. works: rank -> which of
    them it works on.
    """
    notes = RankNotes(tmp_path, attempt=0)
    queue = open_queue()
    ids = [send(queue, seed).id for seed in range(2)]
    for _ in range(attempts - 1):
        for job in [queue.next(), queue.next()][::-1]:
            queue.retry(job)
    queue.next(), queue.next()
    for rank, jobs in works.items():
        notes.put_jobs(rank, [ids[job] for job in jobs])
    notes.put_exits(exits)
    queue._store.note(seen)
    queue = open_queue(complete=partial(notes.complete))
    return [queue.find(each) for each in ids]


def outcomes(jobs):
    return [(job.status, job.attempts) for job in jobs]


AGAIN, FRESH = (JobStatus.QUEUED, 1), (JobStatus.QUEUED, 0)
FAILED, FAILED_TWICE = (JobStatus.FAILED, 1), (JobStatus.FAILED, 2)


@pytest.mark.parametrize(
    ("exits", "works", "attempts", "expected"),
    [
        ({1: KILLED}, {0: [0], 1: [1]}, 1, [FRESH, AGAIN]),
        ({1: KILLED}, {0: [0], 1: [1]}, 2, [AGAIN, FAILED_TWICE]),
        ({1: KILLED}, {0: [0, 1], 1: [0, 1]}, 1, [AGAIN, AGAIN]),
        ({1: KILLED}, {0: [0], 1: []}, 1, [FRESH, FRESH]),
        ({1: CRASHED}, {0: [0], 1: [1]}, 1, [FRESH, FAILED]),
        ({1: ABORTED, 0: EXIT_LOST_RANK}, {0: [0], 1: [1]}, 1, [FRESH, FAILED]),
        ({1: CRASHED}, {0: [0], 1: [0, 1]}, 1, [AGAIN, AGAIN]),  # one of the two: each runs alone
        ({0: KILLED, 1: ABORTED}, {0: [0], 1: [1]}, 1, [FRESH, AGAIN]),
        ({1: CRASHED}, {}, 1, [AGAIN, AGAIN]),
        ({1: CRASHED}, {}, 2, [FAILED_TWICE, FAILED_TWICE]),
    ],
)
def test_a_job_pays_for_its_own_rank_only_and_is_not_begun_again_if_it_crashed_it(
    exits, works, attempts, expected, open_queue, tmp_path
):
    jobs = after(open_queue, tmp_path, exits=exits, works=works, attempts=attempts)
    assert outcomes(jobs) == expected


def test_error_of_a_job_that_crashed_its_rank_says_so(open_queue, tmp_path):
    jobs = after(open_queue, tmp_path, exits={0: CRASHED}, works={0: [0]}, seen=UNKNOWN)
    assert str(jobs[0].error).startswith(
        "this job ended a rank, so it is not tried again: rank 0 was killed by SIGSEGV. Ask for"
    )


@pytest.mark.parametrize("text", ["", "{", "5", '{"a": 1}', "[1, "])
def test_damaged_note_of_jobs_is_no_note(text, tmp_path):
    notes = RankNotes(tmp_path, attempt=0)
    notes.put_jobs(1, ["a"])
    assert notes.jobs(1) == ("a",)
    (tmp_path / "0-rank1.jobs").write_text(text)
    assert notes.jobs(1) is None
