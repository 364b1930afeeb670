"""How many ranks work on each job, decided from times."""

import pytest

from hosts.jobs.speed import (
    ASSUMED_GAIN,
    NUM_DRIFTING,
    Drift,
    Speed,
    best_size,
    gathering_is_quicker,
)
from hosts.jobs.work import Work

TWO = {1: 10.0, 2: 6.0}
FOUR = {1: 10.0, 2: 6.0, 4: 4.0}


def test_one_job_is_for_all_ranks_even_if_fewer_were_as_quick():
    assert best_size(1, TWO) == 2
    assert best_size(1, {1: 10.0, 2: 11.0}) == 2


@pytest.mark.parametrize(("num_jobs", "size"), [(2, 1), (3, 1), (12, 1)])
def test_several_jobs_are_for_one_rank_each_where_two_are_not_twice_as_fast(num_jobs, size):
    assert best_size(num_jobs, TWO) == size


@pytest.mark.parametrize("num_jobs", [2, 3, 12])
def test_jobs_are_for_all_ranks_where_these_are_more_than_twice_as_fast(num_jobs):
    assert best_size(num_jobs, {1: 10.0, 2: 4.9}) == 2


def test_four_ranks_form_two_teams_for_two_jobs_and_four_for_four():
    # two jobs: 4 + 4 one after the other, 6 in two teams, 10 on one rank each
    assert [best_size(number, FOUR) for number in (1, 2, 4, 8)] == [4, 2, 1, 1]


def test_equally_good_sizes_leave_it_to_more_ranks():
    assert best_size(2, {1: 8.0, 2: 4.0}) == 2


def test_last_job_waits_for_a_team_that_is_nearly_done_and_not_for_one_that_has_just_begun():
    assert gathering_is_quicker([TWO], [1.0], team_size=1)  # 1 + 6 against 10
    assert not gathering_is_quicker([TWO], [5.0], team_size=1)  # 5 + 6 against 10


def test_two_jobs_are_taken_although_a_third_team_size_would_do_one_of_them_sooner():
    assert not gathering_is_quicker([TWO, TWO], [0.0], team_size=1)
    assert not gathering_is_quicker([TWO, TWO], [9.0], team_size=1)


def test_free_teams_gather_for_fewer_jobs_than_teams():
    assert gathering_is_quicker([FOUR, FOUR], [], team_size=1)  # two teams of two: 6 against 10
    assert not gathering_is_quicker([FOUR] * 4, [], team_size=1)


def test_large_job_is_weighed_by_its_own_time():
    large = {size: 10 * seconds for size, seconds in TWO.items()}
    assert gathering_is_quicker([large], [20.0], team_size=1)  # 20 + 60 against 100
    assert not gathering_is_quicker([TWO], [20.0], team_size=1)


def work(num_steps):
    return Work(height=10, width=10, num_frames=1, num_steps=num_steps)


def test_speed_is_the_best_of_the_last_few_jobs():
    speed = Speed()
    for seconds in (9.0, 2.0, 3.0, 3.0, 3.0, 3.0):
        speed.learn(ranks=1, work=work(10), seconds=seconds, step_seconds=seconds)
    assert speed.seconds(1, work(20)) == pytest.approx(6.0)
    assert speed.measured() == {1: 3000.0}


def test_speed_of_other_sizes_is_assumed_from_the_nearest_measured_one():
    speed = Speed()
    assert speed.seconds(1, work(10)) == pytest.approx(speed.seconds(2, work(10)) * ASSUMED_GAIN)
    speed.learn(ranks=4, work=work(10), seconds=1.0, step_seconds=1.0)
    assert speed.seconds(1, work(10)) == pytest.approx(ASSUMED_GAIN**2)
    speed.learn(ranks=1, work=work(10), seconds=2.0, step_seconds=2.0)
    assert (speed.seconds(1, work(10)), speed.seconds(4, work(10))) == (2.0, 1.0)


def test_decoding_of_short_jobs_is_not_taken_for_slow_steps():
    # a step takes 1 s on one rank and 0.6 s on both, the rest 8 s on either: one rank was measured
    # with short jobs, both with long ones
    speed = Speed()
    speed.learn(ranks=1, work=work(4), seconds=12.0, step_seconds=4.0)
    speed.learn(ranks=2, work=work(40), seconds=32.0, step_seconds=24.0)
    times = {size: speed.seconds(size, work(30)) for size in (1, 2)}
    assert times == pytest.approx({1: 38.0, 2: 26.0})
    assert best_size(2, times) == 1, "both ranks are not twice as fast as one"
    assert speed.measured() == {1: pytest.approx(1e4), 2: pytest.approx(6e3)}


@pytest.mark.parametrize(
    ("ratios", "has_drifted"),
    [
        ([1.4] * NUM_DRIFTING, True),
        ([0.7] * NUM_DRIFTING, True),
        ([1.4] * (NUM_DRIFTING - 1), False),
        ([1.4] * (NUM_DRIFTING - 1) + [1.2], False),
        ([1.4] * (NUM_DRIFTING - 1) + [0.7], False),
        ([1.0] + [1.4] * NUM_DRIFTING, True),
        ([1.4] * NUM_DRIFTING + [1.0], False),
    ],
)
def test_jobs_that_all_differ_by_thirty_percent_say_that_the_measurement_no_longer_holds(
    ratios, has_drifted
):
    drift = Drift()
    for ratio in ratios:
        drift.learn(2.0 * ratio, expected_s=2.0)
    assert drift.has_drifted == has_drifted
