"""Jobs on disk: accepted jobs and their results survive the death of every process. SQLite for the
facts (hosts/jobs/database.py), .npy files for arrays.

The queue (hosts/jobs/queue.py) and its archive call this with the queue locked, except for the two
methods that write arrays before a row refers to them.
A job's arrays are written first, under another name, and renamed when they are complete; then its
row. Arrays without a row were never accepted and are removed. Nothing is unpickled.

What cannot be written about an accepted job, mostly because the disk is full, is kept in memory and
written as soon as that is possible. Until then the row says what it said before: if rank 0 is lost,
the job runs again.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from backends.errors import ConfigError, UnavailableError
from backends.request import Array, GenerateResult
from hosts.jobs import serialization
from hosts.jobs.database import COLUMNS, UNWRITABLE, JobDatabase
from hosts.jobs.job import Job, JobStatus
from hosts.supervision.exit_reports import UNKNOWN, ExitReport

logger = logging.getLogger(__name__)

LOCK_PATIENCE_S = 5.0
"""Time to wait for the lock: the previous rank 0 may not have ended yet."""
DISK_PATIENCE_S = 10.0
"""Time to wait with results since the disk became full. Their clients get them then: a full disk
may stay so for hours.
"""
RETRY_S = 0.5
"""Between two attempts to write what could not be written."""


class Store(Protocol):
    """Where a queue writes its jobs."""

    is_durable: bool
    """Whether jobs can be found again after a restart."""

    def load(self) -> list[Job]:
        """Return all jobs, in the order in which they were accepted. Status and attempts are those
        of the last `save`.
        """

    def last_report(self) -> ExitReport:
        """Return why the last process that used the store ended, as far as it left a report."""

    def put_inputs(self, job: Job) -> None: ...

    def drop_inputs(self, job: Job) -> None: ...

    def put_result(self, job: Job, result: GenerateResult) -> None: ...

    def add(self, job: Job) -> None: ...

    def save(self, job: Job, status: JobStatus) -> None: ...

    def forget(self, job: Job) -> None: ...

    def remember(self, name: str, text: str) -> None:
        """Keep a text of the host under this name."""

    def recall(self, name: str) -> str:
        """Return the text that was kept last; empty if there is none."""


class NoStore:
    """No store: jobs are in memory only and lost with rank 0."""

    is_durable = False

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def load(self) -> list[Job]:
        return []

    def last_report(self) -> ExitReport:
        return UNKNOWN

    def put_inputs(self, job: Job) -> None: ...

    def drop_inputs(self, job: Job) -> None: ...

    def put_result(self, job: Job, result: GenerateResult) -> None: ...

    def add(self, job: Job) -> None: ...

    def save(self, job: Job, status: JobStatus) -> None: ...

    def forget(self, job: Job) -> None: ...

    def remember(self, name: str, text: str) -> None:
        self._texts[name] = text

    def recall(self, name: str) -> str:
        return self._texts.get(name, "")


@dataclass(slots=True, kw_only=True, eq=False)
class _Change:
    """What is to be written about a job."""

    job: Job
    status: JobStatus | None
    """None for a job that is to be removed."""
    result: GenerateResult | None = None
    """What it has generated, if its arrays may have to be written."""
    has_arrays: bool = False
    """Whether they are written."""


class JobStore:
    """The jobs in one folder, which belongs to one process at a time."""

    is_durable = True

    def __init__(self, folder: Path) -> None:
        """Open the folder's store, or create one. ConfigError if it cannot be used. A damaged one
        is moved aside, and what can be read of it is kept.
        """
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._arrays = folder / "arrays"
            self._arrays.mkdir(mode=0o700, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"--state_dir={folder} cannot be used ({error.strerror}). Give a folder that this "
                "user may write."
            ) from error
        self._take_lock()
        self._database = JobDatabase(folder / "jobs.sqlite")
        self._changing = threading.RLock()
        """Held while a row is packed and written, so that a later change of it comes later."""
        self._unwritten: dict[str, _Change] = {}
        """Job id -> what is to be written about it."""
        self._unwritten_since_s: float | None = None
        """By the monotonic clock."""
        self._writer: threading.Thread | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """Release the folder."""
        self._closed.set()
        self._database.close()
        self._lock.close()

    def load(self) -> list[Job]:
        """Return every row as a job. Arrays that belong to no job are removed."""
        rows = self._database.rows()
        jobs = [job for row in rows if (job := serialization.unpack_job(row, self._read_array))]
        wanted = {f"{job.id}.request" for job in jobs if not job.finished.is_set()} | {
            f"{job.id}.result" for job in jobs
        }
        for found in self._arrays.iterdir():
            if found.name not in wanted:
                shutil.rmtree(found, ignore_errors=True)
        return jobs

    def note(self, ending: ExitReport) -> None:
        """Write for the next process why this one ends. The first report counts: later ones may be
        its consequences.
        """
        with (
            contextlib.suppress(OSError),
            (self._folder / "last_report").open("x", encoding="utf-8") as file,
        ):  # or a full disk
            file.write(ending.to_text())

    def last_report(self) -> ExitReport:
        path = self._folder / "last_report"
        with contextlib.suppress(OSError):
            words = path.read_text(encoding="utf-8", errors="replace")
            path.unlink()
            with contextlib.suppress(Exception):  # whatever is wrong with the text
                return ExitReport.from_text(words)
        return UNKNOWN

    def put_inputs(self, job: Job) -> None:
        """Write the arrays of a job that is about to be accepted. UnavailableError if that
        fails.
        """
        arrays = serialization.pack_request(job.request)[1]
        if arrays:
            with self._writing():
                self._write_arrays(f"{job.id}.request", arrays)

    def drop_inputs(self, job: Job) -> None:
        """Remove the arrays of a job that was not accepted after all."""
        shutil.rmtree(self._arrays / f"{job.id}.request", ignore_errors=True)

    def put_result(self, job: Job, result: GenerateResult) -> None:
        """Write the result and a row that says that the job is done. While the disk is full, wait
        for a while: what a client has seen should still be there after a restart.
        """
        change = _Change(job=job, status=JobStatus.DONE, result=result)
        started_s = time.monotonic()
        while (error := self._try(change)) is not None:
            if time.monotonic() > (self._unwritten_since_s or started_s) + DISK_PATIENCE_S:
                return self._write_later(change, error)
            time.sleep(RETRY_S)

    def add(self, job: Job) -> None:
        """Write a job that is accepted by that. UnavailableError if that fails."""
        with self._writing():
            self._write_row(job, job.status, None)

    def save(self, job: Job, status: JobStatus) -> None:
        """Write the accepted job as it is now, with this status, or later if that fails."""
        with self._changing:
            change = self._unwritten.get(job.id) or _Change(job=job, status=status)
            change.status = status
            if change.result is not None:
                return  # its arrays are next, and not while the queue is locked
            if (error := self._try(change)) is not None:
                self._write_later(change, error)

    def forget(self, job: Job) -> None:
        """Remove the job and its images. If its row cannot be removed, that is done later; without
        its images it is unknown after a restart all the same.
        """
        with self._changing:
            self._unwritten.pop(job.id, None)
            change = _Change(job=job, status=None)
            if (error := self._try(change)) is not None:
                self._write_later(change, error)
        for kind in ("request", "result"):
            shutil.rmtree(self._arrays / f"{job.id}.{kind}", ignore_errors=True)

    def remember(self, name: str, text: str) -> None:
        """Write a text into a file of this name. UnavailableError if that fails."""
        with self._writing(f"the {name}"):
            unfinished = self._folder / f"{name}.new"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.rename(self._folder / name)

    def recall(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / name).read_text(encoding="utf-8", errors="replace")
        return ""

    @contextlib.contextmanager
    def _writing(self, what: str = "the job") -> Iterator[None]:
        try:
            yield
        except UNWRITABLE as error:
            raise UnavailableError(
                f"{what} cannot be stored: {error}. Try again later; the operator must look at "
                "the host's --state_dir."
            ) from error

    def _take_lock(self) -> None:
        """Lock the folder. The kernel releases a POSIX lock with this process, and no child
        inherits it.
        """
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"--state_dir={self._folder} is in use by another host. Give each host a "
                        "folder of its own."
                    ) from error
                time.sleep(0.1)

    def _try(self, change: _Change, *, is_again: bool = False) -> Exception | None:
        """Write a change. Return the error if that fails."""
        job_id = change.job.id
        try:
            if change.result is not None and not change.has_arrays:
                arrays = serialization.pack_result(change.result)[1]
                self._write_arrays(f"{job_id}.result", arrays)
                change.has_arrays = True
            with self._changing:
                if is_again and self._unwritten.get(job_id) is not change:  # forgotten meanwhile
                    if change.has_arrays:
                        shutil.rmtree(self._arrays / f"{job_id}.result", ignore_errors=True)
                    return None
                if change.status is None:
                    self._database.delete(job_id)
                else:
                    self._write_row(change.job, change.status, change.result)
                self._unwritten.pop(job_id, None)
        except UNWRITABLE as error:
            return error
        return None

    def _write_row(self, job: Job, status: JobStatus, result: GenerateResult | None) -> None:
        """Write the job as it is now. result: of a job that does not have it yet. Raises
        UNWRITABLE.
        """
        result = job.result or result
        row = {
            **{name: getattr(job, name) for name in COLUMNS if hasattr(job, name)},
            "state": status.value,
            "request": serialization.pack_request(job.request)[0],
            "result": serialization.pack_result(result)[0] if result is not None else None,
            "error": serialization.pack_error(job.error) if job.error is not None else None,
        }
        self._database.save(row)
        if job.ended_s is not None:
            shutil.rmtree(self._arrays / f"{job.id}.request", ignore_errors=True)

    def _write_later(self, change: _Change, error: Exception) -> None:
        job_id = change.job.id
        if job_id not in self._unwritten:
            what = "the result" if change.result is not None else "a change"
            logger.error(
                "%s of job %s cannot be stored yet, it is in memory: %s", what, job_id, error
            )
        with self._changing:
            self._unwritten[job_id] = change
            if self._writer is None:
                self._unwritten_since_s = time.monotonic()
                self._writer = threading.Thread(target=self._write_unwritten, daemon=True)
                self._writer.start()

    def _write_unwritten(self) -> None:
        """Write what could not be written, as soon as that is possible."""
        while not self._closed.wait(RETRY_S):
            for change in list(self._unwritten.values()):
                if not self._closed.is_set():
                    self._try(change, is_again=True)
            with self._changing:
                if not self._unwritten:
                    logger.warning("all changes of jobs are stored again")
                    self._writer = self._unwritten_since_s = None
                    return

    def _read_array(self, folder: str, name: str) -> Array:
        return serialization.read_array(self._arrays / folder / f"{name}.npy")

    def _write_arrays(self, name: str, arrays: serialization.Arrays) -> None:
        """Write all arrays or none. They are on the disk when this returns."""
        target, unfinished = self._arrays / name, self._arrays / f"{name}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)  # of an attempt whose row was never written
        unfinished.mkdir(mode=0o700)
        try:
            for array_name, array in arrays.items():
                _write_array(unfinished / f"{array_name}.npy", array)
            unfinished.rename(target)
        except BaseException:  # a full disk gets its room back
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        descriptor = os.open(self._arrays, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_array(path: Path, array: Array) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
