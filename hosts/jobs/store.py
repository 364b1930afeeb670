"""Jobs on disk: accepted jobs and their results survive the death of every process. SQLite for the
facts, .npy files for arrays.

The queue (hosts/jobs/queue.py) and its archive call this with the queue locked, except for the two
methods that write arrays before a row refers to them.
A job's arrays are written first, under another name, and renamed when they are complete; then its
row. Arrays without a row were never accepted and are removed. Nothing is unpickled.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backends.errors import ConfigError, UnavailableError
from backends.request import Array, GenerateResult
from hosts.jobs import serialization
from hosts.jobs.job import Job, JobStatus
from hosts.supervision.exit_reports import UNKNOWN, ExitReport

logger = logging.getLogger(__name__)

VERSION = 2
"""Version of the tables. A store of a later version is refused."""
APPLICATION = 0x64690000
"""Added to the version and written beside it: if they differ, a bit of one of them is wrong."""
DISK = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_BUSY", "SQLITE_NOMEM")
"""Beginnings of the names of errors that are not the file's."""
CORRUPT = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CONSTRAINT")
"""Beginnings of the names of errors that a correct statement meets in a damaged file only."""
LOCK_PATIENCE_S = 5.0
"""Time to wait for the lock: the previous rank 0 may not have ended yet."""
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What a damaged database raises: SQLite's message may quote bytes that are no text."""
MAX_SALVAGED = 100_000
"""Newest rows that are read out of a damaged database."""
COLUMNS = (
    "id", "client", "key", "fingerprint", "state", "attempts", "cancel_requested", "cancel_reason",
    "deadline_s",
    "created_s", "started_s", "ended_s", "step", "num_steps", "request", "result", "error",
    "owner",
)  # fmt: skip
MARK = f"""
PRAGMA user_version = {VERSION};
PRAGMA application_id = {APPLICATION + VERSION};
"""
UPGRADE = f"BEGIN; ALTER TABLE jobs ADD COLUMN owner NOT NULL DEFAULT ''; {MARK} COMMIT;"
"""Of version 1."""
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, {", ".join(COLUMNS)}, UNIQUE (id)
);
{MARK}
"""
SAVE = (
    f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    "ON CONFLICT (id) DO UPDATE SET "
    f"{', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])}"
)


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

    def save(self, job: Job, status: JobStatus) -> None: ...

    def forget(self, job: Job) -> None: ...

    def remember(self, name: str, text: str) -> None:
        self._texts[name] = text

    def recall(self, name: str) -> str:
        return self._texts.get(name, "")


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
        self._database = folder / "jobs.sqlite"
        try:
            self._connection = _connect(self._database)
        except DAMAGE as error:
            name = getattr(error, "sqlite_errorname", "")  # none if the error is our own
            if name.startswith(DISK) or not os.access(folder, os.W_OK):
                raise ConfigError(
                    f"--state_dir={folder} cannot be used: {error}. Free some space, or give "
                    "another folder."
                ) from error
            self._connection = self._repaired(error)

    def close(self) -> None:
        """Release the folder."""
        self._connection.close()
        self._lock.close()

    def load(self) -> list[Job]:
        """Return every row as a job. Arrays that belong to no job are removed."""
        try:
            rows = _rows(self._connection)
        except DAMAGE as error:
            self._connection.close()
            self._connection = self._repaired(error)
            rows = _rows(self._connection)
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
        """Write the result's arrays, if that is possible. `save` writes the row that refers to
        them.
        """
        try:
            self._write_arrays(f"{job.id}.result", serialization.pack_result(result)[1])
        except OSError as error:
            logger.error(
                "the result of job %s stays in memory, it cannot be stored: %s", job.id, error
            )

    def save(self, job: Job, status: JobStatus) -> None:
        """Write the job as it is now, with this status. UnavailableError if that fails."""
        text, _ = serialization.pack_request(job.request)
        row = {
            **{name: getattr(job, name) for name in COLUMNS if hasattr(job, name)},
            "state": status.value,
            "request": text,
            "result": serialization.pack_result(job.result)[0] if job.result is not None else None,
            "error": serialization.pack_error(job.error) if job.error is not None else None,
        }
        with self._writing():
            self._change(SAVE, [row[name] for name in COLUMNS])
        if job.ended_s is not None:
            shutil.rmtree(self._arrays / f"{job.id}.request", ignore_errors=True)

    def forget(self, job: Job) -> None:
        """Remove the job and its images."""
        with self._writing():
            self._change("DELETE FROM jobs WHERE id = ?", [job.id])
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

    def _change(self, statement: str, values: list[Any]) -> None:
        """Execute a statement, in a repaired database if the present one turns out to be damaged:
        not all damage can be seen when it is opened.
        """
        try:
            self._connection.execute(statement, values)
        except DAMAGE as error:
            if not getattr(error, "sqlite_errorname", "").startswith(CORRUPT):
                raise
            self._connection.close()
            self._connection = self._repaired(error)
            self._connection.execute(statement, values)

    @contextlib.contextmanager
    def _writing(self, what: str = "the job") -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error, ConfigError) as error:
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

    def _repaired(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        """Return a new database with what can be read of the damaged one, which is kept in a folder
        beside it.
        """
        aside = self._folder / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            for suffix in ("", "-wal", "-shm"):
                if (found := Path(f"{self._database}{suffix}")).exists():
                    found.rename(aside / found.name)
            rows = _salvage(aside / self._database.name)
            connection = _connect(self._database)
            connection.executemany(SAVE, [[row[name] for name in COLUMNS] for row in rows])
        except (OSError, sqlite3.Error) as second:
            raise ConfigError(
                f"--state_dir={self._folder} holds a damaged jobs.sqlite ({error}) that cannot be "
                f"repaired ({second}). "
                "Move the folder away, or give another."
            ) from second
        logger.error(
            "%s was damaged (%s): it was moved to %s, and %d jobs in it could be read",
            self._database,
            error,
            aside,
            len(rows),
        )
        return connection

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


def _connect(path: Path) -> sqlite3.Connection:
    """Return a checked connection. sqlite3.DatabaseError if the file is damaged, ConfigError if a
    later version wrote it.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "PRAGMA synchronous = FULL"
        )  # 0.4 ms for each change on an SSD, and it survives a power cut
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        beside = connection.execute("PRAGMA application_id").fetchone()[0]
        if beside not in (0, APPLICATION + version):
            raise sqlite3.DatabaseError("its version is damaged")
        if version > VERSION:
            raise ConfigError(
                f"{path} was written by a later version of this program (tables {version}, here "
                f"{VERSION}). Use another folder."
            )
        answer = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if answer != "ok":
            raise sqlite3.DatabaseError(answer)
        if version == 1:
            connection.executescript(UPGRADE)
        connection.executescript(SCHEMA)
        columns = {row[1] for row in connection.execute("PRAGMA table_info(jobs)")}
        if columns != {"number", *COLUMNS}:
            raise sqlite3.DatabaseError("it holds other tables than this program's")
    except (
        BaseException
    ):  # whatever it is: the file must be free for the repair, which moves it aside
        connection.close()
        raise
    return connection


def _rows(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Return all rows in their order. sqlite3.DatabaseError if one cannot be read."""
    connection.row_factory = sqlite3.Row
    return [dict(row) for row in connection.execute("SELECT * FROM jobs ORDER BY number")]


def _salvage(path: Path) -> list[dict[str, Any]]:
    """Return the rows that can be read, in their order."""
    found = []
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")
        # one by one: an error in one page ends a longer query
        for number in _numbers(connection):
            with contextlib.suppress(Exception):  # also of names of columns that cannot be read
                cursor = connection.execute("SELECT * FROM jobs WHERE number = ?", [number])
                found_row = zip(("number", *COLUMNS), cursor.fetchone(), strict=False)
                row = {"owner": "", **dict(found_row)}  # version 1 had none
                if _is_plausible(row):
                    found.append(row)
    return found


def _numbers(connection: sqlite3.Connection) -> list[int]:
    """Return the numbers of rows that may be there: the highest one may be damaged, too."""
    found: set[int] = set()
    with contextlib.suppress(Exception):
        for row in connection.execute("SELECT number FROM jobs"):
            found.add(int(row[0]))
    with contextlib.suppress(Exception):
        query = "SELECT seq FROM sqlite_sequence WHERE name = 'jobs'"
        last = int(connection.execute(query).fetchone()[0])
        found |= {*range(max(1, last - MAX_SALVAGED), last + 1)}
    return sorted(found)


def _is_plausible(row: Mapping[str, Any]) -> bool:
    try:
        return (
            row["state"] in set(JobStatus)
            and isinstance(row["id"], str)
            and isinstance(json.loads(row["request"]), dict)
        )
    except (TypeError, ValueError, RecursionError):
        return False
