"""The job store: what a queue leaves on disk, and what the next one makes of it. Processes are killed for real in the last tests."""

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.errors import CancelledError, ConfigError, HostError, NotFoundError, RankError, RequestError, UnavailableError
from backends.request import GenerateRequest, GenerateResult
from hosts import records, store
from hosts.endings import Ending
from hosts.jobs import JobQueue, JobStatus
from hosts.store import JobStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def open_queue(tmp_path, monkeypatch):
    """A queue on the store of one folder; opening the next one is the death of the one before, as the disk sees it."""
    monkeypatch.setattr(store, "LOCK_PATIENCE_S", 0.0)
    opened = []

    def open_queue(**settings):
        if opened:
            opened.pop().close()
        opened.append(JobStore(tmp_path / "state"))
        return JobQueue(store=opened[0], **settings)

    yield open_queue
    for one in opened:
        one.close()


def request(seed=1, **fields):
    return GenerateRequest(prompt="a cat", seed=seed, **fields)


def result(seed=1, side=8):
    frames = np.random.default_rng(seed).integers(0, 255, (1, side, side, 3), dtype=np.uint8)
    latents = np.full((1, 4, 1, 1), seed, dtype=np.float32)
    return GenerateResult(
        frames=frames,
        latents=latents,
        seed=seed,
        num_steps=2,
        exactness="exact",
        seconds=0.1,
        report={"wait_s": 0.5},
        resolved={"seed": seed},
    )


def send(queue, seed=1, **arguments):
    return queue.submit(request(seed), is_stored=True, **arguments)


def test_request_comes_back_as_it_was():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    asked = request(
        scheduler={"scheduler": "euler", "plain": {"tensors": []}}, latents=np.ones((1, 4, 2, 2), np.float32), init_image=picture,
        control_image=[picture, picture.rotate(90)], sigmas=[1.0, 0.0], strength=0.5,
    )  # fmt: skip
    text, arrays = records.pack_request(asked)
    back = records.unpack_request(text, arrays.__getitem__)
    assert back.model_fields_set == asked.model_fields_set
    assert records.fingerprint(back) == records.fingerprint(asked)
    assert back.scheduler == asked.scheduler and back.sigmas == asked.sigmas
    assert (np.asarray(back.control_image[1]) == np.asarray(asked.control_image[1])).all()
    assert records.fingerprint(request(2)) != records.fingerprint(request(1))
    assert records.fingerprint(request(latents=np.zeros(3))) != records.fingerprint(request(latents=np.ones(3)))


@pytest.mark.parametrize(
    "error", [RankError("rank 1 failed: x", rank=1), RequestError("no", field="steps"), CancelledError("c"), HostError("h")]
)
def test_error_comes_back_as_it_was(error):
    back = records.unpack_error(records.pack_error(error))
    assert type(back) is type(error) and str(back) == str(error)
    assert getattr(back, "rank", None) == getattr(error, "rank", None) and getattr(back, "field", None) == getattr(error, "field", None)


def test_waiting_jobs_run_after_a_restart_in_their_order_with_the_seeds_they_had(open_queue):
    queue = open_queue()
    seeds = {(job := send(queue, None)).id: job.request.seed for _ in range(3)}
    queue = open_queue()
    assert [job.id for job in queue.jobs()] == list(seeds)
    for job_id, seed in seeds.items():
        job = queue.next()
        assert (job.id, job.request.seed, job.attempts) == (job_id, seed, 1)
        queue.finish(job, result=result())


def test_job_that_ran_is_begun_again_before_all_others_and_only_once(open_queue):
    queue = open_queue()
    jobs = [send(queue, seed, client=client) for seed, client in ((1, "a"), (2, "b"), (3, "a"))]
    assert queue.next().id == jobs[0].id
    queue = open_queue()
    assert queue.next().id == jobs[0].id
    JobStore.note(queue._store, Ending(why="rank 1 was gone", rank=1))
    queue = open_queue()
    again = queue.find(jobs[0].id)
    assert again.status is JobStatus.FAILED and again.finished.is_set()
    with pytest.raises(
        HostError, match=r"ended 2 times while this job ran, so it is not tried again. The last time: rank 1 was gone. Ask for"
    ):
        again.wait()
    assert queue.next().id == jobs[1].id
    queue = open_queue()
    assert queue.find(jobs[0].id).status is JobStatus.FAILED


def test_last_words_are_those_of_the_last_process(open_queue):
    queue = open_queue()
    send(queue)
    queue.next()
    JobStore.note(queue._store, Ending(why="rank 1 was gone", rank=1))
    queue = open_queue()
    queue.next()
    queue = open_queue()
    assert "rank 0 ended without a word" in str(queue.jobs()[0].error)


def test_result_of_before_the_restart_is_the_same_and_is_not_made_again(open_queue):
    queue = open_queue()
    job = send(queue)
    queue.finish(queue.next(), result=result(5))
    queue = open_queue()
    back = queue.find(job.id)
    assert back.status is JobStatus.DONE and queue.num_waiting == 0
    made, want = back.wait(), result(5)
    assert (made.frames == want.frames).all() and (made.latents == want.latents).all()
    assert (made.seed, made.report, made.resolved, made.exactness) == (5, want.report, want.resolved, "exact")
    assert back.step == job.step and back.ended_s == job.ended_s


def test_kept_results_hold_no_files_open(open_queue):
    queue = open_queue()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        send(queue)
        queue.finish(queue.next(), result=result())
    queue = open_queue()
    assert sum(job.wait().frames.nbytes > 0 for job in queue.jobs()) == 10
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_failed_and_cancelled_jobs_stay_so(open_queue):
    queue = open_queue()
    failed, cancelled, stopped = send(queue), send(queue), send(queue)
    queue.finish(queue.next(), error=RankError("rank 1 failed: x", rank=1))
    queue.cancel(cancelled, "not wanted")
    queue.cancel(queue.next(), "changed my mind")  # and the ranks die before its next step
    queue = open_queue()
    assert queue.num_waiting == 0
    for job, match in ((failed, "rank 1 failed: x"), (cancelled, "not wanted"), (stopped, "changed my mind")):
        with pytest.raises(HostError, match=match):
            queue.find(job.id).wait()
    assert queue.find(stopped.id).status is JobStatus.CANCELLED


def test_jobs_that_were_not_to_be_stored_are_not(open_queue, tmp_path):
    queue = open_queue()
    queue.submit(request(), is_kept=True)
    queue.submit(request())
    assert open_queue().jobs() == []


def test_host_that_stops_leaves_its_jobs_to_the_next_at_no_cost(open_queue):
    for _ in range(3):
        queue = open_queue()
        if not queue.jobs():
            sent = [send(queue).id, send(queue, 2).id]
        job = queue.next()
        assert (job.id, job.attempts) == (sent[0], 1)
        queue.close(UnavailableError("stopping"), finish_running=True)
        assert not job.must_stop and not queue.wait_until_idle(0.01)
        queue.interrupt()
        assert job.must_stop
        queue.finish(job, error=CancelledError("at step 3"))
        assert not job.finished.is_set() and queue.wait_until_idle(0)
    queue = open_queue()
    queue.next()
    queue.close(UnavailableError("stopping"), finish_running=True)
    queue.interrupt()  # and is killed before the next step
    assert open_queue().next().attempts == 1


def test_job_that_ends_while_the_host_stops_is_done(open_queue):
    queue = open_queue()
    job = send(queue)
    queue.next()
    queue.close(UnavailableError("stopping"))
    queue.finish(job, result=result())
    assert open_queue().find(job.id).status is JobStatus.DONE


def test_ranks_that_are_lost_leave_the_running_job_running(open_queue):
    queue = open_queue()
    job, waiting = send(queue), send(queue)
    queue.next()
    queue.abandon(UnavailableError("lost"))
    assert not job.finished.is_set() and not waiting.finished.is_set(), "a client that asks now would hear of a failure that is none"
    queue = open_queue()
    assert [found.id for found in queue.jobs()] == [job.id, waiting.id]


def test_retried_job_comes_next_and_only_once(open_queue):
    queue = open_queue()
    first, second = send(queue, client="a"), send(queue, client="b")
    assert queue.next() is first
    assert queue.retry(first) and first.status is JobStatus.QUEUED
    assert queue.next() is first and first.attempts == 2
    assert not queue.retry(first)
    queue.finish(first, error=RankError("x", rank=1))
    assert queue.next() is second
    queue.cancel(second)
    assert not queue.retry(second), "a cancelled job was begun again"


def test_key_gives_the_same_job_also_after_a_restart(open_queue):
    queue = open_queue()
    job = send(queue, None, key="k", client="a")
    assert send(queue, None, key="k", client="a") is job and queue.num_waiting == 1
    assert send(queue, None, key="k", client="b") is not job
    queue = open_queue()
    again = send(queue, None, key="k", client="a")
    assert (again.id, again.request.seed) == (job.id, job.request.seed) and queue.num_waiting == 2
    with pytest.raises(RequestError, match=f"Idempotency-Key='k' belongs to job '{job.id}', which asked for something else. Use a new key"):
        send(queue, 77, key="k", client="a")


def test_key_is_free_once_its_job_is_forgotten(open_queue):
    queue = open_queue(num_kept=1)
    first = send(queue, key="k")
    send(queue)
    for _ in range(2):
        queue.finish(queue.next(), result=result())
    assert send(queue, key="k").id != first.id


@pytest.mark.parametrize("bounds", [{"num_kept": 2}, {"kept_bytes": 2 * (8 * 8 * 3 + 16)}])
def test_results_are_kept_within_bounds_and_their_files_go(bounds, open_queue, tmp_path):
    queue = open_queue(**bounds)
    jobs = [send(queue) for _ in range(4)]
    for _ in jobs:
        queue.finish(queue.next(), result=result())
    queue = open_queue(**bounds)
    assert [job.id for job in reversed(queue.jobs())] == [job.id for job in jobs[2:]]
    assert sorted(path.name for path in (tmp_path / "state" / "arrays").iterdir()) == sorted(f"{job.id}.result" for job in jobs[2:])
    with pytest.raises(NotFoundError, match="there is no job"):
        queue.find(jobs[0].id)


def test_results_are_kept_for_their_time(open_queue):
    queue = open_queue(kept_seconds=0.2)
    job = send(queue)
    queue.finish(queue.next(), result=result())
    assert queue.find(job.id) is job
    time.sleep(0.25)
    with pytest.raises(NotFoundError):
        queue.find(job.id)
    assert open_queue().jobs() == []


def test_pictures_of_a_waiting_job_are_stored_and_go_when_it_is_over(open_queue, tmp_path):
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    queue = open_queue()
    job = queue.submit(request(init_image=picture), is_stored=True)
    queue = open_queue()
    assert queue.find(job.id).request.init_image.getpixel((0, 0)) == (1, 2, 3)
    queue.finish(queue.next(), result=result())
    assert [path.name for path in (tmp_path / "state" / "arrays").iterdir()] == [f"{job.id}.result"]


def test_arrays_without_a_job_are_removed(open_queue, tmp_path):
    queue = open_queue()
    for name in ("x-1.request", "x-1.result.new"):
        (tmp_path / "state" / "arrays" / name).mkdir()
    queue = open_queue()
    assert list((tmp_path / "state" / "arrays").iterdir()) == [] and queue.jobs() == []


def test_job_whose_pictures_are_gone_fails_and_the_others_run(open_queue, tmp_path):
    queue = open_queue()
    bad = queue.submit(request(init_image=Image.new("RGB", (8, 8))), is_stored=True)
    good, done = send(queue), send(queue)
    queue.cancel(done)
    (tmp_path / "state" / "arrays" / f"{bad.id}.request" / "init_image.npy").write_bytes(b"no array")
    queue = open_queue()
    with pytest.raises(HostError, match=r"what was stored of this job cannot be read any more. Send it again."):
        queue.find(bad.id).wait()
    assert queue.next().id == good.id


def test_truncated_result_is_an_error_and_no_crash(open_queue, tmp_path):
    queue = open_queue()
    job = send(queue)
    queue.finish(queue.next(), result=result(side=64))
    file = tmp_path / "state" / "arrays" / f"{job.id}.result" / "frames.npy"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(HostError, match="cannot be read any more"):
        open_queue().find(job.id).wait()


def test_array_file_is_never_unpickled(open_queue, tmp_path):
    queue = open_queue()
    job = queue.submit(request(init_image=Image.new("RGB", (8, 8))), is_stored=True)
    np.save(tmp_path / "state" / "arrays" / f"{job.id}.request" / "init_image.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(HostError, match="cannot be read any more"):
        open_queue().find(job.id).wait()


def _damage_header(path):
    path.write_bytes(b"no database at all" + path.read_bytes()[18:])


def _damage_pages(path):
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4 // 4096 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)


def _damage_tables(path):
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE jobs RENAME TO other")
        connection.execute("CREATE TABLE jobs (name)")


@pytest.mark.parametrize(("damage", "at_least"), [(_damage_header, 0), (_damage_pages, 10), (_damage_tables, 0)])
def test_damaged_store_is_moved_aside_and_what_can_be_read_goes_on(damage, at_least, open_queue, tmp_path, caplog):
    queue = open_queue()
    sent = [send(queue, seed).id for seed in range(48)]
    queue._store.close()
    damage(tmp_path / "state" / "jobs.sqlite")
    queue = open_queue()
    left = [job.id for job in queue.jobs()]
    assert at_least <= len(left) < len(sent) and left == [job_id for job_id in sent if job_id in left]
    assert "was damaged" in caplog.text and f"and {len(left)} jobs in it could be read" in caplog.text
    assert [path.name for path in tmp_path.glob("state/damaged-*/jobs.sqlite")] == ["jobs.sqlite"]
    assert send(queue).id in [job.id for job in open_queue().jobs()]


def test_store_of_a_later_version_is_refused(open_queue, tmp_path):
    open_queue()._store.close()
    with sqlite3.connect(tmp_path / "state" / "jobs.sqlite") as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(ConfigError, match=r"was written by a later version of this program \(tables 2, here 1\). Use another folder"):
        open_queue()


def test_store_in_use_is_refused(open_queue, tmp_path):
    open_queue()
    program = f"from hosts import store; store.LOCK_PATIENCE_S = 0; store.JobStore(store.Path({str(tmp_path / 'state')!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "is in use by another host. Give each host a folder of its own." in done.stderr.splitlines()[-1]


def test_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--state_dir=.*/file cannot be used \(File exists\). Give a folder that this user may write"):
        JobStore(tmp_path / "file")


def test_full_disk_refuses_new_jobs_and_lets_accepted_ones_end(open_queue, caplog):
    queue = open_queue()
    job = send(queue)
    queue._store._connection.execute(f"PRAGMA max_page_count = {queue._store._connection.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(
        UnavailableError, match=r"the job cannot be stored: database or disk is full. Try again later; the operator must look at"
    ):
        for _ in range(40):
            queue.submit(request(prompt_embeds=None, negative_prompt="x" * 4000), is_stored=True)
    num_waiting = queue.num_waiting
    queue.finish(queue.next(), result=result())
    assert job.wait().seed == 1 and queue.num_waiting == num_waiting - 1


def test_result_that_cannot_be_written_is_answered_from_memory(open_queue, tmp_path, caplog):
    queue = open_queue()
    job = send(queue)
    (tmp_path / "state" / "arrays").rmdir()
    queue.finish(queue.next(), result=result())
    assert (job.wait().frames == result().frames).all()
    assert "stays in memory, it cannot be stored" in caplog.text


def test_folder_is_for_its_user_alone(open_queue, tmp_path):
    open_queue()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.timeout(850)
@pytest.mark.parametrize("rounds", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_killed_at_any_moment_no_job_is_lost_and_none_has_two_pictures(rounds, tmp_path):
    command = [sys.executable, "-m", "tests.hosts.store_killer", str(tmp_path / "state"), str(rounds), "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["accepted"] > rounds and verdict["begun_twice"] > 0, verdict
    assert verdict["done"] >= verdict["accepted"] - verdict["failed"], verdict
    never = (
        "lost",
        "wrong_pictures",
        "different_pictures",
        "done_and_failed",
        "begun_more_often",
        "same_key_twice",
        "failed_with_other_reasons",
    )
    assert not {name: verdict[name] for name in never if verdict[name]}, verdict
