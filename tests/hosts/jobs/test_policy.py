"""When the ranks split, which team takes a job, and when all meet again."""

import pytest

from backends.model_table import read_table
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, LoadRequest
from hosts.jobs.decision import Choice
from hosts.jobs.job import Job, JobStatus
from hosts.jobs.policy import Sharing, SplitPeriod
from hosts.launch.team_modes import Teams

LOAD = LoadRequest(model_type="sdxl", checkpoint="", variant="fp32")
ONE_EACH = {1: ParallelPlan(method="single")}


def sharing(mode="auto", *, seconds=(10.0, 6.0)):
    """Of two ranks; seconds that one rank and both need for 100 steps."""
    made = Sharing(
        spec=read_table()["sdxl"],
        load=LOAD,
        teams=Teams(mode=mode, plans={} if mode == "latency" else ONE_EACH),
        world_size=2,
    )
    for ranks, needed in enumerate(seconds, start=1):
        made.learn(job(), ranks=ranks, seconds=needed, step_seconds=needed)
    return made


def job(steps=100, *, step=0, spent=0.0):
    made = Job(
        id="x",
        request=GenerateRequest(num_inference_steps=steps, height=64, width=64),
        num_steps=steps,
        step=step,
    )
    if spent:
        made.status, made.started_s = JobStatus.RUNNING, made.created_s - spent
    return made


@pytest.mark.parametrize(
    ("mode", "sizes"), [("latency", [2, 2, 2]), ("throughput", [1, 1, 1]), ("auto", [2, 1, 1])]
)
def test_team_size_follows_the_mode_and_in_auto_the_number_of_jobs(mode, sizes):
    assert [sharing(mode).team_size([job()] * count) for count in (1, 2, 8)] == sizes


@pytest.mark.parametrize(
    ("mode", "seconds_of_both", "age_s", "waits"),
    [
        *(
            ("auto", 6.0, 0.049, True),
            ("auto", 6.0, 0.051, False),
            ("auto", 2.0, 0.019, True),
            ("auto", 2.0, 0.021, False),
        ),
        *(("latency", 6.0, 0.0, False), ("throughput", 6.0, 0.0, False)),
        ("auto", 6.0, -600.0, False),  # of a host that was started again with its clock set back
    ],
)
def test_job_that_comes_alone_waits_for_others_a_hundredth_of_its_time(
    monkeypatch, mode, seconds_of_both, age_s, waits
):
    alone, ranks = job(), sharing(mode, seconds=(10.0, seconds_of_both))
    monkeypatch.setattr("hosts.jobs.policy.now", lambda: alone.created_s + age_s)
    assert ranks.may_get_company([alone]) is waits
    assert not ranks.may_get_company([alone, job()])


def test_free_team_takes_what_waits_waits_while_others_run_and_leaves_when_none_does():
    period = SplitPeriod(sharing(), team_size=1)
    assert period.choose([job()] * 2, []) is Choice.TAKE
    assert period.choose([job()], [job(step=1, spent=0.1)]) is Choice.TAKE
    assert period.choose([], [job(step=1, spent=0.1)]) is Choice.WAIT
    assert period.choose([], []) is Choice.LEAVE
    assert period.choose([job()], []) is Choice.LEAVE, "one team has left already"


def test_last_job_is_left_to_all_ranks_when_the_other_team_is_nearly_done():
    for step, spent, choice in ((90, 9.0, Choice.LEAVE), (10, 1.0, Choice.TAKE)):
        period = SplitPeriod(sharing(), team_size=1)
        period.choose([job()] * 2, [])
        assert period.choose([job()], [job(step=step, spent=spent)]) is choice


def test_ranks_that_have_just_split_do_not_meet_before_one_job_was_begun():
    period = SplitPeriod(
        sharing(seconds=(10.0, 1.0)), team_size=1
    )  # both ranks are far quicker, as a rule
    assert period.choose([job()], []) is Choice.TAKE
    assert period.choose([job()], []) is Choice.LEAVE


def test_throughput_mode_never_gathers():
    period = SplitPeriod(sharing("throughput", seconds=(10.0, 1.0)), team_size=1)
    assert [period.choose(waiting, []) for waiting in ([], [job()], [], [job()])] == [
        Choice.WAIT,
        Choice.TAKE,
        Choice.WAIT,
        Choice.TAKE,
    ]


def test_team_that_leaves_for_a_reason_of_its_own_ends_the_split():
    period = SplitPeriod(sharing("throughput"), team_size=1)
    period.end()
    assert period.choose([job()], []) is Choice.LEAVE
