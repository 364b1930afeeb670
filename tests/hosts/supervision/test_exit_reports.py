"""The reason of a lost rank: who it was, what ended it, and the last lines of its log, without
anybody else's.
"""

import logging
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hosts.supervision import log
from hosts.supervision.exit_reports import UNKNOWN, ExitReport, RankNotes
from hosts.supervision.parent_watch import EXIT_LOST_RANK

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def notes(tmp_path):
    return RankNotes(tmp_path, attempt=2)


@pytest.fixture
def rank_log(notes):
    """The log of rank 1 as that rank keeps it, and this process's own afterwards."""
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    log.configure(rank=1, kept_in=notes.log_file(1))
    yield logging.getLogger("hosts.test")
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], logging.raiseExceptions = handlers, raises
    root.setLevel(level)


@pytest.mark.parametrize(
    ("exits", "seen", "why", "rank"),
    [
        (
            {1: -9, 0: EXIT_LOST_RANK},
            UNKNOWN,
            "rank 1 was killed by SIGKILL, which the kernel sends when memory runs out",
            1,
        ),
        ({0: -11}, UNKNOWN, "rank 0 was killed by SIGSEGV", 0),
        (
            {1: 3},
            ExitReport(why="rank 1 was gone", rank=1, is_seen_only=True),
            "rank 1 ended with exit code 3",
            1,
        ),
        (
            {1: -9, 0: 70},
            ExitReport(why="rank 1 has sent no heartbeat for 10 s", rank=1),
            "rank 1 has sent no heartbeat for 10 s",
            1,
        ),
        (
            {1: 70},
            ExitReport(why="rank 1 was gone", rank=1, is_seen_only=True),
            "rank 1 was gone",
            1,
        ),
        ({}, UNKNOWN, "rank 0 ended without a reason", 0),
    ],
)
def test_exit_code_says_more_than_that_a_rank_was_gone_and_less_than_who_saw_it_hang(
    exits, seen, why, rank, notes
):
    notes.put_exits(exits)
    ending = notes.complete(seen)
    assert (ending.why, ending.rank) == (why, rank)


def test_last_lines_are_those_of_the_lost_rank_about_this_job_or_none(notes, rank_log):
    rank_log.info("loaded")
    with log.about_job("a-1"):
        rank_log.info("somebody else's")
    with log.about_job("a-2"):
        rank_log.error("trace\nof two lines")
    http = threading.Thread(
        target=lambda: rank_log.info("what a client sent"), name="CP Server Thread-5"
    )
    http.start()
    http.join()
    ending = notes.complete(ExitReport(why="rank 1 was gone", rank=1))
    first, *lines = ending.last_lines("a-2").splitlines()
    assert first == "The last lines of the log of rank 1:"
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "rank1 I hosts.test: loaded",
        "rank1 E hosts.test [a-2]: trace",
        "    of two lines",
    ]


def test_last_lines_are_bounded_however_much_was_written(notes, rank_log):
    for number in range(3000):
        rank_log.info("line %d %s", number, "x" * 400)
    text = notes.complete(ExitReport(why="gone", rank=1)).last_lines("a")
    assert len(text) < 2100 and text.count("\n") <= 10 and "line 2999" in text
    assert sum(path.stat().st_size for path in notes.log_file(1).parent.iterdir()) < 200_000


def test_rank_that_crashes_leaves_its_stack(notes):
    program = f"""
import faulthandler, os, signal
from pathlib import Path
from hosts.supervision.exit_reports import RankNotes
RankNotes(Path({str(notes.log_file(0).parent)!r}), attempt=2).record_crash(0)
def in_a_kernel():
    os.kill(os.getpid(), signal.SIGSEGV)
in_a_kernel()
"""
    code = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode
    assert code == -signal.SIGSEGV
    notes.put_exits({0: code})
    said = notes.complete(UNKNOWN).last_lines("any")
    assert "Fatal Python error: Segmentation fault" in said and "in in_a_kernel" in said


def test_ending_survives_being_written_and_damaged_notes_are_no_reason_to_fail(notes):
    ending = ExitReport(
        why="rank 1 was gone", rank=1, lines=(("a", "one"), (None, "two")), is_seen_only=True
    )
    assert ExitReport.from_text(ending.to_text()) == ending
    notes.log_file(1).write_text('{"job": null, "text": "whole"}\n{"job": nu')
    assert notes.lines(1) == ((None, "whole"),)


def test_notes_of_older_attempts_are_removed_and_no_others(notes, tmp_path):
    old, new = RankNotes(tmp_path, attempt=1), RankNotes(tmp_path, attempt=3)
    for each in (old, notes, new):
        each.mark("served")
    (tmp_path / "jobs.sqlite-wal").touch()
    notes.forget_older()
    assert [each.marked_s("served") is not None for each in (old, notes, new)] == [
        False,
        True,
        True,
    ]
    assert (tmp_path / "jobs.sqlite-wal").exists()
