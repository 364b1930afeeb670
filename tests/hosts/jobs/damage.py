"""A job store with wrong bits, from a seed, and a host that uses what is left of it."""

import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from backends.errors import HostError
from hosts.jobs.job import JobStatus
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import JobStore
from tests.hosts.jobs.stored import request, result, send

FRESH = "a cat for ever"
NUM_JOBS = 5


def make_store(folder: Path) -> None:
    """Make a store with jobs of every state, and why the last process ended."""
    queue = JobQueue(store=JobStore(folder))
    for seed in range(NUM_JOBS - 1):
        send(queue, seed, client="me", key=f"key {seed}")
    queue.submit(request(init_image=Image.new("RGB", (8, 8))), is_stored=True)
    done, failed, _ = queue.next(), queue.next(), queue.next()
    queue.finish(done, result=result())
    queue.finish(failed, error=HostError("it failed"))
    (folder / "last_report").write_text('{"why": "rank 1 was killed", "lines": []}')
    queue._store.close()


def damaged(original: Path, folder: Path, chance: random.Random) -> str:
    """Copy the store with one to three wrong bits in one of its files. Return which."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(path.read_bytes())
    bits = [chance.randrange(8 * len(data)) for _ in range(min(len(data), chance.randrange(1, 4)))]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"{path.name}, bits {bits}"


def open_whatever_is_there(folder: Path) -> int:
    """Take over and use the jobs as a host does. Return how many there are, with a new one. Nothing
    may raise but the error of a job.
    """
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


def jobs_left_or_error(folder: Path) -> int | str:
    """Return how many jobs a host has that starts with this store, or why it does not start."""
    try:
        return open_whatever_is_there(folder)
    except Exception as error:  # whatever the damage did
        return repr(error)
