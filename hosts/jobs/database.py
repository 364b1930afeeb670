"""The SQLite database of the job store, one row for each job: checked when it is opened, and
repaired when it turns out to be damaged. Nothing else here knows SQL.
"""

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from hosts.jobs.job import JobStatus

logger = logging.getLogger(__name__)

VERSION = 2
"""Version of the tables. A store of a later version is refused."""
APPLICATION = 0x64690000
"""Added to the version and written beside it: if they differ, a bit of one of them is wrong."""
DISK = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_BUSY", "SQLITE_NOMEM")
"""Beginnings of the names of errors that are not the file's."""
CORRUPT = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CONSTRAINT")
"""Beginnings of the names of errors that a correct statement meets in a damaged file only."""
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What a damaged database raises: SQLite's message may quote bytes that are no text."""
UNWRITABLE = (OSError, sqlite3.Error, ConfigError)
"""What a change raises that cannot be written."""
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


class JobDatabase:
    """The rows. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open the database, or create one. A damaged one is moved into a folder beside it, and
        what can be read of it is kept. ConfigError if that fails.
        """
        self._path = path
        self._lock = threading.RLock()
        try:
            self._connection = _connect(path)
        except DAMAGE as error:
            name = getattr(error, "sqlite_errorname", "")  # none if the error is our own
            if name.startswith(DISK) or not os.access(path.parent, os.W_OK):
                raise ConfigError(
                    f"--state_dir={path.parent} cannot be used: {error}. Free some space, or give "
                    "another folder."
                ) from error
            self._connection = self._repaired(error)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows by column, in the order in which they were first saved."""
        with self._lock:
            try:
                return _rows(self._connection)
            except DAMAGE as error:
                self._connection.close()
                self._connection = self._repaired(error)
                return _rows(self._connection)

    def save(self, row: Mapping[str, Any]) -> None:
        """Write the row, instead of the one of this id if there is one. Raises UNWRITABLE."""
        self._change(SAVE, [row[name] for name in COLUMNS])

    def delete(self, job_id: str) -> None:
        """Remove the row of this id, if there is one. Raises UNWRITABLE."""
        self._change("DELETE FROM jobs WHERE id = ?", [job_id])

    def _change(self, statement: str, values: Sequence[Any]) -> None:
        """Execute a statement, in a repaired database if the present one turns out to be damaged:
        not all damage can be seen when it is opened.
        """
        with self._lock:
            try:
                self._connection.execute(statement, values)
            except DAMAGE as error:
                if not getattr(error, "sqlite_errorname", "").startswith(CORRUPT):
                    raise
                self._connection.close()
                self._connection = self._repaired(error)
                self._connection.execute(statement, values)

    def _repaired(self, error: Exception) -> sqlite3.Connection:
        """Return a new database with what can be read of the damaged one, which is kept in a folder
        beside it.
        """
        aside = self._path.parent / f"damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            aside.mkdir(mode=0o700, exist_ok=True)
            for suffix in ("", "-wal", "-shm"):
                if (found := Path(f"{self._path}{suffix}")).exists():
                    found.rename(aside / found.name)
            rows = _salvage(aside / self._path.name)
            connection = _connect(self._path)
            connection.executemany(SAVE, [[row[name] for name in COLUMNS] for row in rows])
        except (OSError, sqlite3.Error) as second:
            raise ConfigError(
                f"--state_dir={self._path.parent} holds a damaged jobs.sqlite ({error}) that "
                f"cannot be repaired ({second}). "
                "Move the folder away, or give another."
            ) from second
        logger.error(
            "%s was damaged (%s): it was moved to %s, and %d jobs in it could be read",
            self._path,
            error,
            aside,
            len(rows),
        )
        return connection


def _connect(path: Path) -> sqlite3.Connection:
    """Return a checked connection. sqlite3.DatabaseError if the file is damaged, ConfigError if a
    later version wrote it.
    """
    try:
        connection = _open(path)
    except sqlite3.OperationalError:
        # a full disk has no room for a file of shared memory, which a single process can do without
        connection = _open(path, locking="EXCLUSIVE")
    try:
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
        # nothing is written where all is there: the disk may be full
        if version == 0:
            connection.executescript(SCHEMA)
        elif version == 1:
            connection.executescript(UPGRADE)
        elif not beside:
            connection.executescript(MARK)
        columns = {row[1] for row in connection.execute("PRAGMA table_info(jobs)")}
        if columns != {"number", *COLUMNS}:
            raise sqlite3.DatabaseError("it holds other tables than this program's")
    except (
        BaseException
    ):  # whatever it is: the file must be free for the repair, which moves it aside
        connection.close()
        raise
    return connection


def _open(path: Path, *, locking: str = "NORMAL") -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA locking_mode = {locking}")
        connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
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
