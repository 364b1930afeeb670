"""After the warm-up N ranks compute exactly what one process computes by the same schedule."""

import itertools

import pytest
import torch

from tests.backends.asyncdiff.runs import attached, from_rank_zero, loaded, prepare, request, result
from tests.backends.asyncdiff.simulation import Simulation

SHIFTS = ({"time_shift": False}, {"time_shift": True})


def timesteps_of(pipe, asked):
    """What the pipeline gives its denoiser as timestep, in a run without anything attached."""
    denoiser, seen = getattr(pipe.pipe, pipe.spec.denoiser), []
    original = denoiser.forward

    def record(*args, **kwargs):
        seen.append(kwargs["timestep"] if "timestep" in kwargs else args[1])
        return original(*args, **kwargs)

    denoiser.forward = record
    try:
        plain = result(pipe, asked)
    finally:
        del denoiser.forward
    return seen, plain


def simulated(simulation, pipe, asked):
    with simulation:
        want = result(pipe, asked)
    assert simulation.evaluation == len(simulation.timesteps)
    return want


def check_equals_simulation(rank, world_size, names, many_options, fields):
    pipes = {name: loaded(name) for name in names}
    for name, options in itertools.product(names, many_options):
        pipe = pipes[name]
        asked = request(name, **({"num_inference_steps": 5, "warmup_steps": 2} | fields))
        timesteps, plain = from_rank_zero(lambda: timesteps_of(pipe, asked))  # noqa: B023
        with attached(pipe, options, rank=rank, world_size=world_size) as backend:
            got = result(pipe, asked)
            again = result(pipe, asked)
            segments, chosen = backend.segments, backend.plan.options
        simulation = Simulation(
            getattr(pipe.pipe, pipe.spec.denoiser),
            unit_names=[unit.name for unit in segments.layout.units],
            bounds=segments.bounds,
            stride=chosen["stride"],
            time_shift=chosen["time_shift"],
            extrapolate=chosen["extrapolate"],
            num_synchronous=asked.warmup_steps * pipe.pipe.scheduler.order,
            timesteps=timesteps,
        )
        want = from_rank_zero(lambda: simulated(simulation, pipe, asked))  # noqa: B023
        label = f"{name} {options}: "
        assert not torch.allclose(want, plain, rtol=0, atol=1e-3), f"{label}nothing is stale, so this test proves nothing"
        # halves of the guidance batch: matrix products of other row counts sum in another order
        close = {"rtol": 0, "atol": 1e-4} if backend.plan.degree("cfg") > 1 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(got, want, **close, msg=lambda text: label + text)  # noqa: B023
        torch.testing.assert_close(again, got, rtol=0, atol=0, msg=lambda text: f"{label}state is left behind: {text}")  # noqa: B023


THREE = [{"model_n": 3}, {"model_n": 2, "stride": 2}]


@pytest.mark.parametrize(
    ("world_size", "degrees", "names"),
    [
        (2, [{"model_n": 2}], ["sdxl", "sd3", "flux"]),
        (3, THREE, ["sdxl"]),
        pytest.param(3, THREE, ["sd3", "flux"], marks=pytest.mark.slow),
        pytest.param(4, [{"model_n": 3, "stride": 2}], ["sdxl", "sd3", "flux"], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "3 ranks", "3 ranks, transformers", "4 ranks"],
)
def test_stale_schedule_equals_its_simulation(run_on_ranks, world_size, degrees, names):
    prepare(*names)
    options = [degree | shift for degree in degrees for shift in SHIFTS]
    run_on_ranks(check_equals_simulation, world_size, names, options, {})
