"""Logging of one rank: every line carries the rank, and the job where one is worked on; followers speak from WARNING up.

At INFO there are no prompts and no keys: a client's words appear in errors that it caused at most.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

Format = Literal["text", "json"]
NOISY = ("diffusers", "transformers", "httpx", "urllib3", "PIL", "torch.distributed")

_job: ContextVar[str | None] = ContextVar("job", default=None)


def configure(*, rank: int, log_format: Format = "text", level: int = logging.INFO) -> None:
    """Set up the root logger of this process. A closed pipe at the other end must neither stop nor block the host."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(rank) if log_format == "json" else TextFormatter(rank))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else logging.WARNING)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextlib.contextmanager
def about_job(job_id: str) -> Iterator[None]:
    """Lines that this thread writes meanwhile carry the job's id."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


class TextFormatter(logging.Formatter):
    """For people: 12:34:56 rank0 I hosts.loop [job]: message."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s rank{rank} %(levelname).1s %(name)s%(job)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        job_id = _job.get()
        record.job = f" [{job_id}]" if job_id is not None else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """For programs: one object a line, with time (UTC, ISO 8601), level, rank, logger, message, and job and trace where there are any."""

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
