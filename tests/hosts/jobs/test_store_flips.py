"""Any bit of a job store may be wrong: the host starts, and what can be read goes on."""

import random
import shutil

import numpy as np
import pytest
from PIL import Image

from backends.errors import HostError
from hosts.jobs.job import JobStatus
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import JobStore
from tests.hosts.jobs.stored import request, result, send

FRESH = "a cat for ever"


@pytest.fixture
def original(tmp_path):
    """A store with jobs of every state, and why the last process ended."""
    folder = tmp_path / "original"
    queue = JobQueue(store=JobStore(folder))
    for seed in range(4):
        send(queue, seed, client="me", key=f"key {seed}")
    queue.submit(request(init_image=Image.new("RGB", (8, 8))), is_stored=True)
    done, failed, _ = queue.next(), queue.next(), queue.next()
    queue.finish(done, result=result())
    queue.finish(failed, error=HostError("it failed"))
    (folder / "last_report").write_text('{"why": "rank 1 was killed", "lines": []}')
    queue._store.close()
    return folder


def open_whatever_is_there(folder):
    """Take over and use the jobs as a host does. Nothing may raise but the error of a job."""
    queue = JobQueue(store=JobStore(folder))
    try:
        for job in queue.jobs():
            queue.position(job)
            if job.finished.is_set() and job.status is JobStatus.DONE:
                frames = job.wait().frames
                assert frames.dtype == np.uint8 and frames.ndim == 4
        fresh = queue.submit(request(negative_prompt=FRESH), is_stored=True)
        while (job := queue.next()).id != fresh.id:
            queue.finish(job, result=result())
        queue.finish(fresh, result=result())
        assert fresh.wait().seed == 1
        return len(queue.jobs())
    finally:
        queue._store.close()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_host_starts_whatever_bit_is_wrong(original, tmp_path, rounds):
    chance, folder, found = random.Random(23), tmp_path / "damaged", []
    for number in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        path = chance.choice(files_of(folder))
        data = bytearray(path.read_bytes())
        bits = [chance.randrange(8 * len(data)) for _ in range(min(len(data), 1 + number % 3))]
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found.append(open_whatever_is_there(folder))
        except Exception as error:  # name the damage
            pytest.fail(f"round {number}, {path.name}, bits {bits}: {error!r}")
    assert sum(found) > 5 * rounds  # of 6: most jobs are still there


def sqlite(original, statement):
    store = JobStore(original)
    store._connection.execute(statement)
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
