"""Logging of one rank: every line carries the rank, and the running job if there is one. Followers
print from WARNING up.

INFO lines hold no prompts and no keys; text of a client appears at most in errors that it caused.
"""

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

Format = Literal["text", "json"]
NOISY = ("diffusers", "transformers", "httpx", "urllib3", "PIL", "torch.distributed")

KEPT_BYTES = 64 * 1024
"""Bytes of each of the two log files that a rank keeps on disk, for the reason if it is lost
(hosts/supervision/exit_reports.py).
"""
OWN_THREADS = ("watch", "watch of the store", "start", "stop", "team")

_job: ContextVar[str | None] = ContextVar("job", default=None)


def configure(
    *,
    rank: int,
    log_format: Format = "text",
    level: int = logging.INFO,
    kept_in: Path | None = None,
) -> None:
    """Set up the root logger of this process. A closed pipe at the other end must neither stop nor
    block the host.

    kept_in: file for the last lines, on followers too.
    """
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(rank) if log_format == "json" else TextFormatter(rank))
    handler.setLevel(level if rank == 0 else logging.WARNING)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 or kept_in is not None else logging.WARNING)
    if kept_in is not None:
        root.addHandler(_keeper(kept_in, rank))
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _keeper(path: Path, rank: int) -> logging.Handler:
    """Return the handler that keeps lines of the rank's own threads. Lines of HTTP threads are
    about one client, and another must not read them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=KEPT_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(KeptFormatter(rank))
    handler.setLevel(logging.INFO)
    handler.addFilter(
        lambda record: (
            record.thread == threading.main_thread().ident or record.threadName in OWN_THREADS
        )
    )
    return handler


@contextlib.contextmanager
def about_job(job_id: str) -> Iterator[None]:
    """Let the lines of this thread carry the job's id, or those of a batch."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


class TextFormatter(logging.Formatter):
    """For people: 12:34:56 rank0 I hosts.ranks.loop [job]: message."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            f"%(asctime)s rank{rank} %(levelname).1s %(name)s%(job)s: %(message)s", "%H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        job_id = _job.get()
        record.job = f" [{job_id}]" if job_id is not None else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Indent further lines, so that no text of a client looks like a line of its own."""
        return super().formatMessage(record).replace("\r", "\n").replace("\n", "\n    ")


class KeptFormatter(logging.Formatter):
    """For hosts/supervision/exit_reports.py: one object a line, with the text and the job it is
    about.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._text = TextFormatter(rank)

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"job": _job.get(), "text": self._text.format(record)})


class JsonFormatter(logging.Formatter):
    """For programs: one object a line, with time (UTC, ISO 8601), level, rank, logger, message, and
    job and trace where there are any.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "rank": self._rank,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (job_id := _job.get()) is not None:
            line["job"] = job_id
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)
