"""Any bit of a job store may be wrong: the host starts, and what can be read goes on."""

import contextlib
import random
import sqlite3

import pytest

from backends.errors import HostError
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import JobStore
from tests.hosts.jobs.damage import (
    NUM_JOBS,
    damaged,
    jobs_left_or_error,
    make_store,
    open_whatever_is_there,
)


@pytest.fixture
def original(tmp_path):
    make_store(tmp_path / "original")
    return tmp_path / "original"


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_host_starts_whatever_bit_is_wrong(original, tmp_path, rounds):
    chance, folder, found = random.Random(23), tmp_path / "damaged", []
    for number in range(rounds):
        damage = damaged(original, folder, chance)
        left = jobs_left_or_error(folder)
        assert isinstance(left, int), f"round {number}, {damage}: {left}"
        found.append(left)
    assert sum(found) > NUM_JOBS * rounds  # of one more: most jobs are still there


def spoil_index(folder):
    """Give every key in the index of the jobs' ids a header of a wrong size, which SQLite notices
    when it compares keys, and not when it checks the file.
    """
    database = folder / "jobs.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE type = 'index'")
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    data = bytearray(database.read_bytes())
    page = (root[0] - 1) * size
    assert data[page] == 0x0A  # a leaf of an index
    for number in range(int.from_bytes(data[page + 3 : page + 5])):
        cell = page + int.from_bytes(data[page + 8 + 2 * number :][:2])
        data[cell + 1] ^= 8
    database.write_bytes(data)


def test_damage_that_is_seen_in_a_change_only_is_repaired_then(original, caplog):
    spoil_index(original)
    assert open_whatever_is_there(original) == NUM_JOBS + 1
    assert "jobs in it could be read" in caplog.text


def sqlite(original, statement):
    store = JobStore(original)
    store._database._connection.execute(statement)
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        "state = 'gone'",
        "state = NULL",
        "attempts = NULL",
        "attempts = 'x'",
        "ended_s = NULL",
        "ended_s = 'soon'",
        "created_s = NULL",
        "deadline_s = 'x'",
        "started_s = x'00'",
        "client = NULL",
        "client = x'ff'",
        "key = 7",
        "step = 'x'",
        "num_steps = NULL",
        "request = NULL",
        "request = '[]'",
        "request = CAST(x'22ff22' AS TEXT)",
        "request = '" + "[" * 100_000 + "'",
        "result = '[]'",
        "error = '[]'",
        'error = \'{"kind": [], "message": 1}\'',
        "cancel_reason = 1",
    ],
)
def test_value_that_cannot_be_costs_its_job_at_most(original, change):
    sqlite(original, f"UPDATE jobs SET {change} WHERE number IN (1, 2, 3, 4)")
    assert open_whatever_is_there(original) >= 2


def test_job_without_an_id_is_left_out(original):
    sqlite(original, "UPDATE jobs SET id = NULL WHERE number = 1")
    assert open_whatever_is_there(original) == 5


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1000000, 1000000, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1, -8, 8, 3), }",
        "{'descr': '|i1', 'fortran_order': False, 'shape': (1, 8, 8, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (8, 8, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': '''",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 8, 8, 3), }",
        "[" * 110,
    ],
)
def test_header_of_an_array_that_cannot_be_costs_its_job_only(original, header):
    path = next(original.glob("arrays/*.result/frames.npy"))
    data = path.read_bytes()
    path.write_bytes(data[:10] + header.encode().ljust(117) + b"\n" + data[128:])
    queue = JobQueue(store=JobStore(original))
    lost = queue.find(path.parent.name.removesuffix(".result"))
    with pytest.raises(HostError, match="cannot be read any more"):
        lost.wait()
    assert len(queue.jobs()) == 5
    queue._store.close()


def test_damage_that_sqlite_cannot_tell_in_utf_8_is_repaired(original):
    path = original / "jobs.sqlite"
    data = bytearray(path.read_bytes())
    data[data.index(b"sqlite_sequence") + 11] ^= 0x80
    path.write_bytes(data)
    assert open_whatever_is_there(original) >= 1
