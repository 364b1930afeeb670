"""Every method on several GPUs, rehearsed: the image is that of the same ranks on the CPU, and no
order of calls can deadlock NCCL.
"""

from collections import Counter

import pytest

from tests.backends.features import TABLE, prepare
from tests.rehearsal.cases import FAILING_LONG, FAILING_SHORT, LONG, SHORT
from tests.rehearsal.order import problems
from tests.rehearsal.runs import checkpoint_of, fail_on_last_rank, rehearse_ranks

SAME = 0.1


def _rehearse(rank, world_size, case):
    found = rehearse_ranks(case, rank)
    print(f"{case.label}: off {found.off:.3f}, alone {found.alone:.3f}", flush=True)
    assert found.off <= SAME
    assert found.alone <= SAME
    for streams in ("pairs", "groups"):
        assert problems(found.journals, streams=streams) == [], streams
    assert not found.late, "opened in the middle of a job"
    assert found.queued_behind.keys() == set(case.queues_in), found.queued_behind
    assert _by_place(found.waits, case.waits) == case.waits, found.waits
    here, on_cpus = found.traffic
    assert here == on_cpus, "other values are sent than on CPUs"


def _by_place(waits, known):
    """Part of a place -> how often the host waited there; others by their whole place."""
    found = Counter()
    for where, count in waits.items():
        found[next((part for part in known if part in where), where)] += count
    return found


def _fail(rank, world_size, case):
    for took_s in fail_on_last_rank(case, rank):
        print(f"{case.label}: rank {rank} told after {took_s:.2f} s", flush=True)


def _run(run_on_ranks, check, case):
    if case.type in TABLE:
        prepare(TABLE[case.type], [case.feature] if case.feature else [])
    else:
        checkpoint_of(case.type)
    run_on_ranks(check, case.ranks, case)


def _named(cases):
    return {"argvalues": cases, "ids": [case.label for case in cases]}


@pytest.mark.parametrize("case", **_named(SHORT))
def test_method_by_the_rules_of_cuda_and_nccl(run_on_ranks, case):
    _run(run_on_ranks, _rehearse, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", **_named(LONG))
def test_every_method_by_the_rules_of_cuda_and_nccl(run_on_ranks, case):
    _run(run_on_ranks, _rehearse, case)


@pytest.mark.parametrize("case", **_named(FAILING_SHORT))
def test_failure_of_one_rank_reaches_the_others_and_the_next_job_does_well(run_on_ranks, case):
    _run(run_on_ranks, _fail, case)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", **_named(FAILING_LONG))
def test_failure_of_one_rank_wherever_the_others_wait(run_on_ranks, case):
    _run(run_on_ranks, _fail, case)
