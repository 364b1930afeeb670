"""python -m tests.hosts.jobs.store_killer FOLDER ROUNDS SEED: kill users of a job store.

Again and again, at random moments.

Each round forks a victim with a queue on the same folder. One of its threads submits jobs, the
other "draws" them; what it tells its clients (accepted, done, failed) goes through a pipe, and what
is in the pipe has been told. The verdict is printed as JSON.
"""

import hashlib
import json
import os
import random
import select
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from backends.request import GenerateRequest, GenerateResult
from hosts.jobs.queue import JobQueue, JobStatus
from hosts.jobs.store import JobStore

MOST_LINES = 12
LONGEST_S = 0.006
LONGEST_OPENING_S = 0.06
WAITING = 4


def draw(request: GenerateRequest) -> np.ndarray:
    """An image that depends on all of the request."""
    noise = np.random.default_rng(request.seed).integers(0, 255, (1, 24, 24, 3), dtype=np.uint8)
    return noise if request.init_image is None else noise ^ np.asarray(request.init_image)


def digest(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()[:16]


def victim(folder: Path, round_number: int, tell) -> None:
    """Works until it is killed, or, in the last round (-1), until nothing is left to do."""
    queue = JobQueue(store=JobStore(folder), num_kept=10_000)
    for job in queue.jobs():  # what this process can tell of jobs of earlier ones
        if job.status is JobStatus.DONE:
            tell(f"done {job.id} {digest(job.result.frames)}")
        elif job.finished.is_set():
            tell(f"failed {job.id} {job.error}")
    tell("open")
    if round_number >= 0:
        threading.Thread(target=submit_jobs, args=(queue, round_number, tell), daemon=True).start()
    while round_number >= 0 or queue.num_waiting:
        job = queue.next()
        tell(f"began {job.id}")
        frames = draw(job.request)
        queue.finish(
            job,
            result=GenerateResult(
                frames=frames,
                latents=None,
                seed=job.request.seed,
                num_steps=1,
                exactness="exact",
                seconds=0,
            ),
        )
        tell(f"done {job.id} {digest(job.wait().frames)}")


def submit_jobs(queue: JobQueue, round_number: int, tell) -> None:
    sample_image = Image.fromarray(np.full((24, 24, 3), round_number % 256, dtype=np.uint8))
    for number in range(1_000_000):
        while queue.num_waiting >= WAITING:
            time.sleep(0.001)
        request = GenerateRequest(
            prompt=f"{round_number}", init_image=sample_image if number % 2 else None
        )
        key = f"{round_number}-{number}"
        job = queue.submit(request, is_stored=True, key=key)
        again = queue.submit(request, is_stored=True, key=key)
        tell(
            f"accepted {job.id} {digest(draw(job.request))}"
            if again is job
            else f"twice {job.id} {again.id}"
        )


def one_round(folder: Path, round_number: int, *, lines: int, then_s: float) -> list[str]:
    """What the victim told. It is killed `then_s` after it has told so many lines of its own; in
    the last round (-1) it is not.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            victim(folder, round_number, lambda line: os.write(writer, f"{line}\n".encode()))
        finally:
            os._exit(0)
    os.close(writer)
    told, kill_at = b"", None
    while True:
        if (
            round_number >= 0
            and kill_at is None
            and told.partition(b"open\n")[2].count(b"\n") >= lines
        ):
            kill_at = time.monotonic() + then_s
        left = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            kill_at, round_number = None, -1
            continue
        if not (piece := os.read(reader, 65536)):
            break
        told += piece
    os.close(reader)
    os.waitpid(pid, 0)
    return told.decode().splitlines()


def main() -> None:
    folder, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    wanted: dict[str, str] = {}
    sample_images: dict[str, set[str]] = {}
    failed: dict[str, str] = {}
    begun: Counter[str] = Counter()
    twice = 0
    for round_number in [*range(rounds), -1]:
        lines = chance.randint(0, MOST_LINES)
        for line in one_round(
            folder,
            round_number,
            lines=lines,
            then_s=chance.uniform(0, LONGEST_S if lines else LONGEST_OPENING_S),
        ):
            what, job_id, *rest = f"{line} ".split(" ", 2)
            if what == "accepted":
                wanted[job_id] = rest[0].strip()
            elif what == "done":
                sample_images.setdefault(job_id, set()).add(rest[0].strip())
            elif what == "failed":
                failed[job_id] = rest[0].strip()
            elif what == "began":
                begun[job_id] += 1
            elif what == "twice":
                twice += 1
    outcome = {
        "rounds": rounds,
        "accepted": len(wanted),
        "done": len(sample_images),
        "failed": len(failed),
        "failed_with_other_reasons": sum(
            "so it is not tried again" not in reason for reason in failed.values()
        ),
        "begun_twice": sum(count == 2 for count in begun.values()),
        "begun_more_often": sum(count > 2 for count in begun.values()),
        "lost": len(set(wanted) - set(sample_images) - set(failed)),
        "done_and_failed": len(set(sample_images) & set(failed)),
        "wrong_images": sum(
            seen != {wanted[job_id]} for job_id, seen in sample_images.items() if job_id in wanted
        ),
        "different_images": sum(len(seen) > 1 for seen in sample_images.values()),
        "same_key_twice": twice,
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
