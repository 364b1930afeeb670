"""After the warm-up N ranks compute exactly what one process computes by the same schedule."""

import itertools

import pytest
import torch

from backends.model_table import read_table
from backends.step_cache_spec import parse_step_cache
from tests.backends.asyncdiff.runs import attached, loaded, prepare, request, result
from tests.backends.asyncdiff.simulation import Simulation
from tests.backends.reference import from_rank_zero, skipped_by_hand

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


def check_equals_simulation(rank, world_size, names, many_options, fields):
    pipes = {name: loaded(name) for name in names}
    for name, options in itertools.product(names, many_options):
        asked = request(name, **({"num_inference_steps": 5, "warmup_steps": 2} | fields))
        with attached(pipes[name], options, rank=rank, world_size=world_size) as backend:
            got = result(pipes[name], asked)
            label = f"{name} {options}: "
            if options == many_options[-1]:
                again = result(pipes[name], asked)
                torch.testing.assert_close(
                    again,
                    got,
                    rtol=0,
                    atol=0,
                    msg=lambda text: f"{label}state is left behind: {text}",
                )
            segments = backend.segments
        compare_with_simulation(pipes[name], asked, backend.plan, segments, got, label)


def compare_with_simulation(pipe, asked, plan, segments, got, label):
    """got: what the ranks made of this request by this plan and these cuts, which are detached by
    now.
    """
    want, plain = from_rank_zero(lambda: simulated(pipe, asked, plan.options, segments))
    assert not torch.allclose(want, plain, rtol=0, atol=1e-3), (
        f"{label}nothing is stale, so this test proves nothing"
    )
    # halves of the guidance batch: matrix products of other row counts sum in another order
    close = {"rtol": 0, "atol": 1e-4} if plan.degree("cfg") > 1 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close, msg=lambda text: label + text)


def is_extrapolated(options, order):
    if options["extrapolate"] is None:
        return options["stride"] == 1 and not options["time_shift"] and order == 1
    return options["extrapolate"]


def simulated(pipe, asked, options, segments):
    """(what the schedule must give, what plain diffusers gives)."""
    timesteps, plain = timesteps_of(pipe, asked)
    with stale_segments(pipe, asked, options, segments, timesteps=timesteps) as simulation:
        want = result(pipe, asked)
    assert simulation.evaluation == len(timesteps)
    return want, plain


def stale_segments(pipe, asked, options, segments, *, timesteps):
    return Simulation(
        getattr(pipe.pipe, pipe.spec.denoiser),
        unit_names=[unit.name for unit in segments.layout.units],
        bounds=segments.bounds,
        stride=options["stride"],
        time_shift=options["time_shift"],
        extrapolate=is_extrapolated(options, pipe.pipe.scheduler.order),
        num_synchronous=asked.warmup_steps * pipe.pipe.scheduler.order,
        timesteps=timesteps,
    )


THREE = [{"model_n": 3}, {"model_n": 2, "stride": 2}]


@pytest.mark.parametrize(
    ("world_size", "degrees", "names"),
    [
        (2, [{"model_n": 2}], ["sdxl", "sd3", "flux"]),
        pytest.param(3, THREE, ["sdxl"], marks=pytest.mark.slow),
        pytest.param(3, THREE, ["sd3", "flux"], marks=pytest.mark.slow),
        pytest.param(
            4, [{"model_n": 3, "stride": 2}], ["sdxl", "sd3", "flux"], marks=pytest.mark.slow
        ),
        pytest.param(2, [{"model_n": 2}], ["zimage", "flux2"], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "3 ranks", "3 ranks, transformers", "4 ranks", "2 ranks, newer types"],
)
def test_stale_schedule_equals_its_simulation(run_on_ranks, world_size, degrees, names):
    prepare(*names)
    options = [degree | shift for degree in degrees for shift in SHIFTS]
    run_on_ranks(check_equals_simulation, world_size, names, options, {})


def check_skipped_steps(rank, world_size, name):
    spec = read_table()[name]
    cache = parse_step_cache("prediction,2", spec)
    pipe = loaded(name)
    asked = request(name, num_inference_steps=7, warmup_steps=2)
    with attached(pipe, {"model_n": 2}, rank=rank, world_size=world_size, step_cache=cache) as ours:
        got = result(pipe, asked)
        segments = ours.segments
    want, plain = from_rank_zero(lambda: skipping(name, asked, ours.plan.options, segments, cache))
    assert not torch.allclose(want, plain, rtol=0, atol=1e-3), "no step was skipped"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def skipping(name, asked, options, segments, cache):
    """(what segments give that know nothing of skipped steps, what they give without)."""
    pipe = loaded(name)
    timesteps, _ = timesteps_of(pipe, asked)
    with stale_segments(pipe, asked, options, segments, timesteps=timesteps):
        plain = result(pipe, asked)
    computed = [time for step, time in enumerate(timesteps) if not cache.skips_whole(step, 7)]
    with stale_segments(pipe, asked, options, segments, timesteps=computed) as simulation:
        with skipped_by_hand(getattr(pipe.pipe, pipe.spec.denoiser), every=2, num_steps=7):
            want = result(pipe, asked)
        assert simulation.evaluation == len(computed) == 5
    return want, plain


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_segments_beside_skipped_steps_equal_the_simulation_of_both(run_on_ranks, name):
    prepare(name)
    run_on_ranks(check_skipped_steps, 2, name)


@pytest.mark.slow
def test_stale_schedule_of_types_with_two_calls_a_step_equals_its_simulation(run_on_ranks):
    """The simulation knows one call a step, so guidance is off."""
    names = ["qwenimage", "wan_t2v"]
    prepare(*names)
    run_on_ranks(check_equals_simulation, 2, names, [{"model_n": 2}], {"guidance_scale": 1.0})
