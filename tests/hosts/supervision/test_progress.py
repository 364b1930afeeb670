"""When work that makes no step counts as a hang: by the job's own step times, generous where
nothing is known.
"""

import pytest

from hosts.supervision.progress import BEGIN_WITHIN_S, Activity


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def steps(activity, clock, *seconds):
    for took in seconds:
        clock.now += took
        activity.step(is_last=False)


def test_rank_that_rests_is_never_overdue(clock):
    activity = Activity(clock=clock)
    clock.now += 1e6
    assert activity.overdue(10) is None
    activity.begin("job 1")
    activity.rest()
    clock.now += 1e6
    assert activity.overdue(10) is None


def test_first_step_and_what_follows_the_last_have_much_time(clock):
    activity = Activity(clock=clock)
    activity.begin("job 1")
    clock.now += BEGIN_WITHIN_S
    assert activity.overdue(10) is None
    clock.now += 1
    assert activity.overdue(10) == "made no step of job 1 for 901 s"
    activity.step(is_last=True)
    clock.now += BEGIN_WITHIN_S
    assert activity.overdue(10) is None


def test_time_before_a_pause_of_the_machine_does_not_count(clock):
    activity = Activity(clock=clock)
    activity.begin("job 1", within_s=5)
    clock.now += 1000
    assert activity.overdue(10) == "made no step of job 1 for 1000 s"
    assert activity.overdue(10, awake_since_s=clock.now - 3) is None
    clock.now += 8
    assert activity.overdue(10, awake_since_s=clock.now - 11) == "made no step of job 1 for 11 s"


@pytest.mark.parametrize(
    ("took", "floor", "allowed"),
    [((60, 2, 3, 2), 10, 30), ((60, 0.1, 0.1), 10, 10), ((5,), 10, 50)],
    ids=["slow", "quick", "one step"],
)
def test_further_steps_have_ten_times_the_longest_but_the_first_and_never_less_than_the_floor(
    took, floor, allowed, clock
):
    activity = Activity(clock=clock)
    activity.begin("job 1")
    steps(activity, clock, *took)
    clock.now += allowed
    assert activity.overdue(floor) is None
    clock.now += 1
    assert (
        activity.overdue(floor)
        == f"made no step of job 1 after step {len(took)} for {allowed + 1} s"
    )


def test_compiled_pipeline_may_compile_at_any_step(clock):
    activity = Activity(clock=clock)
    activity.begin("job 1", least_s=3600)
    steps(activity, clock, 1, 1)
    clock.now += 3600
    assert activity.overdue(10) is None


def test_marks_are_made_once():
    made = []
    activity = Activity(mark=made.append)
    for what in ("ready", "served", "served"):
        activity.mark(what)
    assert made == ["ready", "served"]
