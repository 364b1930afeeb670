"""Which replica takes the next job, by arithmetic alone."""

from hosts.cluster.routing import Load, capacity, is_next


def load(name, work=0.0, taken_s=0.0, can_take=True):
    return Load(name=name, work=work, taken_s=taken_s, can_take=can_take)


def taker(*loads):
    """Of all replicas exactly one takes the job, or none."""
    found = [
        mine.name
        for mine in loads
        if is_next(mine, [other for other in loads if other is not mine])
    ]
    assert len(found) <= 1
    return found[0] if found else None


def test_the_replica_with_the_least_work_left_is_next():
    assert taker(load("a", work=3.0), load("b", work=1.0), load("c", work=2.0)) == "b"


def test_of_idle_replicas_the_one_that_has_waited_longest_is_next():
    assert taker(load("a", taken_s=20.0), load("b", taken_s=10.0)) == "b"


def test_equal_replicas_do_not_wait_for_each_other():
    assert taker(load("a"), load("b")) == "a"


def test_a_replica_that_can_take_none_is_passed_over():
    assert taker(load("a", work=0.0, can_take=False), load("b", work=9.0)) == "b"
    assert taker(load("a", can_take=False), load("b", can_take=False)) is None


def test_only_ranks_that_may_split_take_a_job_each():
    assert [capacity(4, mode) for mode in ("latency", "throughput", "auto")] == [1, 4, 4]
