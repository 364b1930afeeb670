"""Lines of the log: for people and for programs."""

import json
import logging

import pytest

from hosts.supervision import log


@pytest.fixture
def written(capsys):
    """configure(**arguments), then what was written since."""
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    yield lambda: capsys.readouterr().err.splitlines()
    root.handlers[:], logging.raiseExceptions = handlers, raises
    root.setLevel(level)


def test_text_line_names_rank_and_job(written):
    log.configure(rank=0)
    logger = logging.getLogger("hosts.test")
    logger.info("before")
    with log.about_job("ab-1"):
        logger.info("%s done", "it")
    logger.info("after")
    lines = [line.split(" ", 1)[1] for line in written()]
    assert lines == [
        "rank0 I hosts.test: before",
        "rank0 I hosts.test [ab-1]: it done",
        "rank0 I hosts.test: after",
    ]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_no_text_looks_like_a_line_of_its_own(written, end):
    log.configure(rank=0)
    forged = "12:00:00 rank0 I hosts.http.access: forged"
    logging.getLogger("hosts.test").warning("scheduler=%s", f"a{end}{forged}")
    lines = written()
    assert len(lines) > 1 and not any(line.startswith("12:00:00") for line in lines)


def test_json_line_is_one_object_with_the_trace_in_it(written):
    log.configure(rank=3, log_format="json")
    with log.about_job("ab-1"):
        try:
            raise ArithmeticError("two\nlines")
        except ArithmeticError:
            logging.getLogger("hosts.test").exception("it %s", "failed")
    (line,) = written()
    facts = json.loads(line)
    assert facts.pop("time").endswith("Z") and "ArithmeticError: two\nlines" in facts.pop("trace")
    assert facts == {
        "level": "error",
        "rank": 3,
        "logger": "hosts.test",
        "message": "it failed",
        "job": "ab-1",
    }


def test_followers_speak_from_warning_up(written):
    log.configure(rank=1, log_format="json")
    logging.getLogger("hosts.test").info("no")
    logging.getLogger("hosts.test").warning("yes")
    assert [json.loads(line)["message"] for line in written()] == ["yes"]
