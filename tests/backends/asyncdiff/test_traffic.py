"""Bytes across the cuts, against broadcasting what every unit returns: arithmetic on the
benchmark's UNet, without its weights.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backends.asyncdiff.executors import SynchronousExecutor
from backends.asyncdiff.schedule import RankRole
from backends.asyncdiff.segments import choose_segments
from backends.asyncdiff.trace import trace
from backends.asyncdiff.units import UnitHooks
from benchmarks.models import sdxl_like_unet


@pytest.fixture(scope="module")
def benchmark_unet():
    """(layout, operations of each unit, hooks, call) on the meta device: shapes are computed,
    numbers are not.
    """
    with torch.device("meta"), torch.no_grad():
        subject = sdxl_like_unet()
        hooks = UnitHooks(subject.pipe.unet)

        def call():
            return subject.predict(subject.sample, torch.tensor(500))

        layout, _ = trace(hooks, call, subject.sample)
        operations = {}

        def count(name, forward, args, kwargs):
            with FlopCounterMode(display=False) as counter:
                result = forward(*args, **kwargs)
            operations[name] = counter.get_total_flops()
            return result

        with hooks.run_with(count):
            call()
        yield layout, [float(1 + operations[unit.name]) for unit in layout.units], hooks, call


LATE = [(3, 1), (4, 1), (2, 2)]


@pytest.mark.parametrize(
    ("model_n", "stride"),
    [(2, 1), (3, 2), *(pytest.param(*degrees, marks=pytest.mark.slow) for degrees in LATE)],
)
def test_a_turn_sends_at_most_a_third_of_what_broadcasting_all_outputs_would(
    benchmark_unet, model_n, stride
):
    layout, operations, hooks, call = benchmark_unet
    segments = choose_segments(layout, operations, model_n)
    shares = [
        sum(operations[unit] for unit in segments.units(segment)) / sum(operations)
        for segment in range(model_n)
    ]
    assert max(shares) < 1.25 / model_n, shares  # a cut that is no cut would send nothing
    place = RankRole(num_segments=model_n, stride=stride, rank=0)
    executor = SynchronousExecutor(segments, place)
    with hooks.run_with(executor.run), torch.device("meta"), torch.no_grad():
        call()
    num_ranks = model_n + stride - 1
    prediction = 2 * 4 * 64 * 64 * 4 * stride * (num_ranks - 1)
    sent, broadcast = (
        executor.shapes.traffic(segments, place) + prediction,
        executor.shapes.num_bytes() * (num_ranks - 1) + prediction,
    )
    assert 0 < prediction < sent <= broadcast / 3, (
        f"{sent / 1e6:.1f} MB of {broadcast / 1e6:.1f} MB"
    )
