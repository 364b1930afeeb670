"""Which jobs are made in one batch, how many, and what becomes of each: without processes."""

import math

import numpy as np
import pytest

from backends.errors import CancelledError, PlanError, RequestError, UnavailableError
from backends.model_table import read_table
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, GenerateResult, LoadRequest
from hosts.jobs.batch_size import NUM_KINDS, TRIED_AGAIN_AFTER, BatchGain
from hosts.jobs.decision import Choice
from hosts.jobs.job import JobStatus
from hosts.jobs.policy import Sharing
from hosts.jobs.queue import JobQueue
from hosts.launch.team_modes import Teams
from hosts.ranks.commands import Failure, Generate, Outcome, Rejoin
from hosts.ranks.dispatch import CANCEL, GO_ON, JobDispatcher
from hosts.supervision.host_state import HostState
from tests.hosts.launch.test_team_modes import teams

LOAD = LoadRequest(model_type="sdxl", checkpoint="", variant="fp32")
SECONDS = {1: 1.0, 2: 1.4, 4: 2.2}
"""Of a whole batch: 1, 0.7 and 0.55 for each image."""


def gain_of(seconds, *, max_batch=4, trials=2):
    gain = BatchGain(max_batch)
    for batch, needed in seconds.items():
        for _ in range(trials):
            gain.learn("kind", batch=batch, seconds=needed)
    return gain


@pytest.mark.parametrize(
    ("known", "limit"),
    [
        ({}, 1),
        ({1: 1.0}, 2),
        ({1: 1.0, 2: 1.4}, 4),
        ({1: 1.0, 2: 1.81}, 1),
        ({1: 1.0, 2: 1.79}, 4),
        (SECONDS, 4),
        ({**SECONDS, 4: 2.6}, 2),
        ({1: 1.0, 2: math.inf}, 1),
    ],
)
def test_batch_is_tried_when_half_of_it_is_known_and_kept_where_a_image_costs_a_tenth_less(
    known, limit
):
    assert gain_of(known).limit("kind") == limit
    assert gain_of(known).limit("another kind") == 1


def test_size_is_judged_by_the_better_of_two_trials_and_by_failures_only_without_any():
    gain = gain_of({1: 1.0})
    gain.learn("kind", batch=2, seconds=9.0)
    assert gain.limit("kind") == 2
    gain.learn("kind", batch=2, seconds=1.4)
    assert gain.limit("kind") == 4
    for _ in range(3):
        gain.learn("kind", batch=2, seconds=math.inf)
    assert gain.limit("kind") == 4
    gain.learn("kind", batch=2, seconds=math.inf)
    assert gain.limit("kind") == 1 and gain.measured() == {"kind": {1: 1.0, 2: None}}


def test_size_that_did_not_pay_is_tried_again_after_many_images_unless_it_could_not_be_made():
    for seconds, limits in ((1.9, (1, 2, 1)), (math.inf, (1, 1, 1))):
        gain = gain_of({1: 1.0, 2: seconds})
        found = []
        for num_more in (TRIED_AGAIN_AFTER - 1, 1):
            for _ in range(num_more):
                gain.learn("kind", batch=1, seconds=1.0)
            found.append(gain.limit("kind"))
        gain.learn("kind", batch=2, seconds=seconds)
        assert (*found, gain.limit("kind")) == limits


@pytest.mark.parametrize(
    ("max_batch", "limits"), [(1, [1, 1, 1]), (2, [2, 2, 2]), (3, [2, 3, 3]), (8, [2, 4, 8])]
)
def test_batches_double_up_to_the_most_that_is_allowed(max_batch, limits):
    known = [{1: 1.0}, {1: 1.0, 2: 1.4}, {1: 1.0, 2: 1.4, 3: 1.6, 4: 2.0}]
    assert [gain_of(each, max_batch=max_batch).limit("kind") for each in known] == limits


def test_share_is_that_of_the_best_batch_that_fits():
    gain = gain_of(SECONDS)
    assert [gain.share("kind", batch) for batch in (1, 2, 3, 4)] == pytest.approx(
        [1.0, 0.7, 0.7, 0.55]
    )
    assert gain_of(SECONDS, trials=1).share("kind", 4) == 1.0


def test_kinds_that_were_not_made_for_long_are_forgotten():
    gain = gain_of(SECONDS)
    for number in range(NUM_KINDS):
        gain.learn(number, batch=1, seconds=1.0)
        if number == 1:
            gain.learn("kind", batch=1, seconds=1.0)
    assert set(gain.measured()) == {"kind", *map(str, range(1, NUM_KINDS))}


def request(seed=1, **fields):
    return GenerateRequest(
        **{
            "prompt": "a cat",
            "seed": seed,
            "num_inference_steps": 4,
            "height": 64,
            "width": 64,
            **fields,
        }
    )


def sharing(*, known=SECONDS, ranks=1, max_batch=4):
    made = Sharing(
        spec=read_table()["sdxl"], load=LOAD, world_size=ranks, max_batch=max_batch,
        teams=Teams(mode="auto", plans={1: ParallelPlan(method="single")}) if ranks > 1 else None,
    )  # fmt: skip
    job = JobQueue().submit(request())
    for batch, seconds in known.items():
        for _ in range(2):
            made.learn(job, ranks=1, seconds=seconds, step_seconds=seconds, batch=batch)
    return made


def taken(queue, rules):
    """Seeds of the jobs that a free rank takes."""
    first = queue.next(take_or_leave, ranks=1)
    return [
        job.request.seed
        for job in (
            first,
            *queue.take_along(first, lambda *jobs: rules.num_companions(first, *jobs)),
        )
    ]


@pytest.mark.parametrize(
    ("ranks", "max_batch", "known", "num_jobs", "batches"),
    [
        (1, 4, SECONDS, 6, [4, 2]),
        (1, 2, SECONDS, 5, [2, 2, 1]),
        (1, 1, SECONDS, 3, [1, 1, 1]),
        (1, 4, {}, 3, [1, 1, 1]),
        (1, 4, {1: 1.0}, 3, [2, 1]),
        (2, 4, SECONDS, 3, [2, 1]),  # the other rank gets a job of its own
        (2, 4, SECONDS, 9, [4, 4, 1]),
        (4, 4, SECONDS, 5, [2, 1, 1, 1]),
    ],
)
def test_ranks_share_out_what_waits_before_one_of_them_takes_several(
    ranks, max_batch, known, num_jobs, batches
):
    queue, rules = JobQueue(), sharing(ranks=ranks, known=known, max_batch=max_batch)
    for seed in range(num_jobs):
        queue.submit(request(seed))
    found = []
    while queue.num_waiting:
        found.append(taken(queue, rules))
    assert [len(seeds) for seeds in found] == batches and [
        seed for seeds in found for seed in seeds
    ] == list(range(num_jobs))


def test_batch_holds_only_those_whose_turn_it_is():
    queue, rules = JobQueue(), sharing()
    for seed, client in ((0, "a"), (1, "a"), (2, "a"), (3, "b"), (4, "b")):
        queue.submit(request(seed, **({"height": 72} if seed == 1 else {})), client=client)
    # turns: 0 of a, 3 of b, 1 of a (other size), 4 of b, 2 of a
    assert [taken(queue, rules) for _ in range(3)] == [[0, 3], [1], [4, 2]]


def test_job_that_was_begun_before_goes_alone():
    queue, rules = JobQueue(), sharing()
    jobs = [queue.submit(request(seed)) for seed in range(4)]
    queue.retry(queue.next())
    assert [taken(queue, rules) for _ in range(2)] == [[0], [1, 2, 3]]
    queue.retry(jobs[2])
    queue.submit(request(4))
    queue.submit(request(5))
    queue._waiting.remove(jobs[2])
    queue._waiting.add(jobs[2])  # behind the others
    assert taken(queue, rules) == [4, 5]


def test_job_of_several_ranks_and_one_with_a_image_go_alone():
    queue, rules = JobQueue(), sharing(ranks=2)
    for seed in range(4):
        queue.submit(
            request(seed, **({"latents": np.zeros((1, 4, 8, 8), np.float32)} if seed > 1 else {}))
        )
    both = queue.next(ranks=2)
    assert queue.take_along(both, lambda *jobs: rules.num_companions(both, *jobs)) == []
    assert [taken(queue, rules) for _ in range(3)] == [[1], [2], [3]]


def test_queue_that_is_closed_gives_no_more_jobs_to_a_batch(open_queue):
    queue = open_queue()
    for seed in range(3):
        queue.submit(request(seed), is_stored=True)
    first = queue.next(ranks=1)
    queue.close(UnavailableError("the host is stopping."), finish_running=True)
    assert queue.take_along(first, lambda waiting, running: len(waiting)) == []
    assert [job.status.value for job in queue.jobs()] == ["running", "queued", "queued"]


def test_auto_mode_splits_where_batches_are_what_makes_one_rank_each_quicker():
    for known, size in (({1: 10.0}, 2), ({1: 10.0, 2: 12.0, 4: 16.0}, 1)):
        rules = sharing(ranks=2, known=known)
        waiting = [JobQueue().submit(request(seed)) for seed in range(8)]
        rules.learn(
            waiting[0], ranks=2, seconds=4.5, step_seconds=4.5
        )  # eight jobs: 36 s together, 40 s one by one, 16 s in batches of four
        assert rules.team_size(waiting) == size


def test_team_is_free_when_its_batch_is_done_and_not_when_one_of_its_jobs_would_be():
    rules = sharing(ranks=2, known={1: 10.0, 2: 12.0, 4: 16.0})
    queue = JobQueue()
    for seed in range(4):
        queue.submit(request(seed))
    assert taken(queue, rules) == [0, 1]
    waiting, running = (
        [job for job in queue.jobs() if job.status is JobStatus.QUEUED],
        [job for job in queue.jobs() if job.batch],
    )
    rules.learn(waiting[0], ranks=2, seconds=6.0, step_seconds=6.0)
    assert len(running) == 2 and not rules.must_gather(waiting[:1], running, team_size=1), (
        "the other rank is free"
    )
    for job in running:
        job.started_s -= 11.5
    # the batch needs 0.5 s more: two jobs are then 12 s for both ranks one after the other, as they
    # are in one batch now
    assert rules._left(running, 1) == pytest.approx(0.5, abs=0.2)


def take_or_leave(waiting, running):
    return Choice.TAKE if waiting else Choice.LEAVE


class OneRank:
    """Rank 0's end for one rank, with everything around it real but for the pipeline."""

    def __init__(self, num_jobs, *, check=lambda request, methods: None, **known):
        self.queue, self.state, self.rules = JobQueue(), HostState(), sharing(**known)
        self.jobs = [self.queue.submit(request(seed), is_kept=True) for seed in range(num_jobs)]
        self.dispatcher = JobDispatcher(
            queue=self.queue, state=self.state, sharing=self.rules, ranks=1, choose=take_or_leave
        )
        self.command = self.dispatcher.next_command(check)

    def ids(self, *numbers):
        return tuple(self.jobs[number].id for number in numbers)

    def states(self):
        return "".join(job.status.value[0] for job in self.jobs)

    def done(self, num_results):
        self.dispatcher.generated(
            [result(seed) for seed in range(num_results)],
            Outcome(failure=None, groups_are_broken=False),
        )

    def failed(self, error):
        self.dispatcher.generated(
            (), Outcome(failure=Failure.of(error, rank=0), groups_are_broken=False)
        )


def result(seed):
    frames = np.full((1, 8, 8, 3), seed, dtype=np.uint8)
    return GenerateResult(
        frames=frames,
        latents=None,
        seed=seed,
        num_steps=2,
        exactness="exact",
        seconds=0.1,
        report={"stages": {"step": 0.1}},
    )


def test_each_job_of_a_batch_gets_its_own_row_its_progress_and_its_preview():
    host = OneRank(3)
    assert host.command == Generate(
        job_ids=host.ids(0, 1, 2), requests=tuple(job.request for job in host.jobs)
    )
    host.jobs[1].wants_preview = True
    assert host.dispatcher.rows_in_view == (1,)
    host.dispatcher.step_done(1, 2, lambda row: np.full((2, 2, 3), row, dtype=np.uint8))
    assert [(job.step, job.preview is not None) for job in host.jobs] == [
        (1, False),
        (1, True),
        (1, False),
    ]
    assert host.jobs[1].preview.max() == 1
    host.done(3)
    assert [job.wait().frames.max() for job in host.jobs] == [0, 1, 2]
    assert {(job.result.report["ranks"], job.result.report["batch"]) for job in host.jobs} == {
        (1, 3)
    }
    assert host.state.facts["last_report"]["batch"] == 3
    assert host.state.facts["seconds_in_batches"]["64x64, 4 steps guided"][3] == pytest.approx(
        0.1 / 3, abs=1e-4
    )


def test_cancelled_job_of_a_batch_ends_at_once_and_the_batch_when_nobody_wants_it():
    host = OneRank(3)
    host.dispatcher.step_done(1, 4, lambda row: None)
    host.queue.cancel(host.jobs[0])
    assert (
        host.states() == "rrr" and host.dispatcher.step_signal() == GO_ON and host.states() == "crr"
    )
    with pytest.raises(CancelledError, match="the job was cancelled after step 1 of 4"):
        host.jobs[0].wait()
    host.dispatcher.step_done(2, 4, lambda row: None)
    assert [job.step for job in host.jobs] == [1, 2, 2]
    host.jobs[1].deadline_s = host.jobs[1].created_s
    assert host.dispatcher.step_signal() == GO_ON and "not done 0 s after it was sent" in str(
        host.jobs[1].error
    )
    host.queue.cancel(host.jobs[2], "its client has gone away")
    assert host.dispatcher.step_signal() == CANCEL and host.states() == "ccr"
    host.failed(CancelledError("the job was cancelled at step 3 of 4."))
    assert host.states() == "ccc" and str(host.jobs[2].error) == "its client has gone away"
    assert [job.attempts for job in host.jobs] == [1, 1, 1]


def test_row_of_the_job_that_is_left_is_its_own():
    host = OneRank(3)
    host.queue.cancel(host.jobs[1])
    host.dispatcher.step_signal()
    host.done(3)
    assert (host.states(), host.jobs[2].result.frames.max()) == ("dcd", 2)


@pytest.mark.parametrize(
    "error",
    [ArithmeticError("a fault"), MemoryError("out of memory"), PlanError("no"), RequestError("no")],
    ids=repr,
)
def test_batch_that_fails_is_made_again_one_by_one_in_its_order(error):
    host = OneRank(4)
    assert len(host.command.job_ids) == 4
    host.failed(error)
    assert host.states() == "qqqq"
    for number in range(4):
        command = host.dispatcher.next_command(lambda request, methods: None)
        assert isinstance(command, Generate) and command.job_ids == host.ids(number)
        host.failed(PlanError("this one is to blame")) if number == 2 else host.done(1)
    assert host.states() == "ddfd" and {job.attempts for job in host.jobs} == {2}


def test_batch_that_cannot_be_made_is_not_tried_for_ever():
    host = OneRank(2, known={1: 1.0})
    for _ in range(2):
        host.failed(MemoryError("out of memory"))
        for _ in range(2):
            host.dispatcher.next_command(lambda request, methods: None)
            host.done(1)
        host.jobs = [host.queue.submit(request(seed)) for seed in range(2)]
        host.command = host.dispatcher.next_command(lambda request, methods: None)
    assert host.command.job_ids == host.ids(0), "two batches have failed"


def test_refused_job_does_not_enter_the_batch():
    def check(asked, methods):
        if asked.seed in (0, 2):
            raise PlanError("it does not fit")

    host = OneRank(4, check=check)
    assert host.command.job_ids == host.ids(1, 3) and host.states() == "frfr"
    host.done(2)
    assert (host.states(), host.jobs[3].result.frames.max()) == ("fdfd", 1)
    host.queue.submit(request(2))
    assert isinstance(host.dispatcher.next_command(check), Rejoin)


@pytest.mark.parametrize(
    ("options", "max_batch", "reason"),
    [
        ({"ranks": 1}, 4, ""),
        ({"ranks": 2, "backend": "distrifuser"}, 4, ""),
        ({"ranks": 1, "max_batch": 7}, 7, ""),
        ({"ranks": 1, "max_batch": 1, "mode": "latency"}, 1, ""),
        (
            {"ranks": 1, "mode": "latency"},
            1,
            "max_batch=1: mode=latency: each image is the same whatever the load",
        ),
        (
            {"ranks": 2, "backend": "asyncdiff", "shard_weights": True},
            1,
            "max_batch=1: no rank works alone",
        ),
        (
            {"ranks": 1, "step_cache": "deep,2"},
            1,
            "max_batch=1: --step_cache decides once for a whole batch",
        ),
        (
            {"ranks": 1, "type_name": "zimage"},
            1,
            "max_batch=1: a row of a batch of Z-Image depends on the others",
        ),
    ],
)
def test_start_says_how_many_jobs_fit_into_a_batch_and_why_only_one(options, max_batch, reason):
    facts = teams(**options).facts()
    assert facts["max_batch"] == max_batch
    assert [said for said in facts["reasons"] if said.startswith("max_batch")] == (
        [reason] if reason else []
    )
