"""How many replicas there should be, by arithmetic alone."""

from hosts.cluster.scaling import Rule, Scale

RULE = Rule(minimum=1, maximum=4, jobs_per_replica=2, idle_s=10.0)


def targets(scale, *looks):
    return [scale.look(num_jobs=num_jobs, now_s=now_s) for now_s, num_jobs in looks]


def test_many_jobs_bring_as_many_replicas_as_they_need_at_once_but_not_more_than_allowed():
    assert targets(Scale(RULE, first=1, now_s=0.0), (0.0, 2), (1.0, 5), (2.0, 100)) == [1, 3, 4]


def test_replicas_go_one_by_one_after_fewer_were_enough_for_a_while():
    scale = Scale(RULE, first=4, now_s=0.0)
    assert targets(scale, (5.0, 0), (10.0, 0), (15.0, 0), (20.0, 0), (30.0, 0), (50.0, 0)) == [
        4,
        3,
        3,
        2,
        1,
        1,
    ]


def test_a_burst_starts_the_while_again():
    scale = Scale(RULE, first=3, now_s=0.0)
    assert targets(scale, (9.0, 6), (15.0, 0), (18.9, 0), (19.0, 0)) == [3, 3, 3, 2]


def test_the_least_number_stays_however_long_nobody_asks():
    scale = Scale(Rule(minimum=2, maximum=4, jobs_per_replica=2, idle_s=0.0), first=2, now_s=0.0)
    assert targets(scale, (1000.0, 0), (2000.0, 0)) == [2, 2]
