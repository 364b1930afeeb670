"""What requests vary: samplers, starts, ends, sizes, cancelling and failing. Nothing of one may be
left in the next.
"""

import pytest
import torch

from tests.backends.asyncdiff.runs import attached, loaded, prepare, request, result
from tests.backends.asyncdiff.test_stale import check_equals_simulation
from tests.backends.reference import from_rank_zero


class Cancelled(Exception):
    """Raised from a step callback, on every rank at the same step."""


def check_windows(rank, world_size, options):
    pipe = loaded("sdxl")
    latents = from_rank_zero(lambda: result(pipe, request("sdxl")))
    fields = {
        "starts late": {"latents": latents.numpy(), "strength": 0.5},
        "ends early": {"denoising_end": 0.6},
        "PNDM, one evaluation more than steps": {"scheduler": {"scheduler": "pndm"}},
        "second order": {"scheduler": {"scheduler": "heun"}},
        "guidance off": {"guidance_scale": 1.0},
    }
    for label, changed in fields.items():
        asked = request("sdxl", num_inference_steps=6, warmup_steps=6, **changed)
        want = from_rank_zero(lambda: result(pipe, asked))
        with attached(pipe, options, rank=rank, world_size=world_size):
            torch.testing.assert_close(
                result(pipe, asked), want, rtol=0, atol=0, msg=lambda text: f"{label}: {text}"
            )


@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, {}), pytest.param(3, {"model_n": 2, "stride": 2}, marks=pytest.mark.slow)],
)
def test_full_warmup_matches_single_for_every_window_and_order(run_on_ranks, world_size, options):
    prepare("sdxl")
    run_on_ranks(check_windows, world_size, options)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, marks=pytest.mark.slow)
        for fields in (
            {"scheduler": {"scheduler": "heun"}},
            {"denoising_end": 0.7, "num_inference_steps": 8},
        )
    ],
    ids=["heun", "denoising_end"],
)
def test_stale_schedule_of_second_order_and_windows_equals_its_simulation(run_on_ranks, fields):
    prepare("sdxl")
    run_on_ranks(
        check_equals_simulation, 3, ["sdxl"], [{"model_n": 2, "stride": 2}, {"model_n": 3}], fields
    )


def test_extrapolation_equals_its_simulation(run_on_ranks):
    prepare("sdxl")
    options = [
        {"model_n": 3, "extrapolate": True},
        {"model_n": 2, "stride": 2, "extrapolate": True},
    ]
    run_on_ranks(check_equals_simulation, 3, ["sdxl"], options, {"num_inference_steps": 7})


def test_guidance_halves_times_segments_equal_the_simulation(run_on_ranks):
    prepare("sdxl")
    run_on_ranks(
        check_equals_simulation,
        4,
        ["sdxl"],
        [{"model_n": 2, "stride": 1, "use_cfg_parallel": True}],
        {},
    )


def check_second_run_is_the_same(rank, world_size, name, options):
    pipe, asked = loaded(name), request(name, warmup_steps=1)
    with attached(pipe, options, rank=rank, world_size=world_size):
        first, second = result(pipe, asked), result(pipe, asked)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_calls_of_a_step_keep_their_state_while_the_split_is_learned(run_on_ranks):
    """The first step of the first run makes both calls on each rank, the others make one."""
    prepare("wan_t2v")
    options = {"model_n": 2, "stride": 1, "use_cfg_parallel": True}
    run_on_ranks(check_second_run_is_the_same, 4, "wan_t2v", options)


def check_state_is_reset(rank, world_size):
    pipe = loaded("sdxl")
    asked = request("sdxl", warmup_steps=1, num_inference_steps=5)

    def cancel(step, num_steps, latents):
        if step == 3:
            raise Cancelled

    with attached(pipe, {}, rank=rank, world_size=world_size) as backend:
        want = result(pipe, asked)
        result(pipe, request("sdxl", warmup_steps=1, height=96, num_inference_steps=3))
        torch.testing.assert_close(
            result(pipe, asked), want, rtol=0, atol=0
        )  # after another size and number of steps

        with pytest.raises(Cancelled):
            pipe.generate(asked, on_step=cancel)
        torch.testing.assert_close(
            result(pipe, asked), want, rtol=0, atol=0
        )  # after a cancelled one

        block = pipe.pipe.unet.mid_block.resnets[0] if rank == 0 else pipe.pipe.unet.conv_out
        handle = block.register_forward_pre_hook(fail_in_call(3))
        with pytest.raises(RuntimeError):
            pipe.generate(asked)
        handle.remove()
        backend.mesh.rebuild()
        torch.testing.assert_close(
            result(pipe, asked), want, rtol=0, atol=0
        )  # after all ranks failed, and new groups


def fail_in_call(number):
    calls = []

    def hook(module, args):
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("out of memory, for the test")

    return hook


def test_nothing_is_left_after_other_sizes_cancelling_and_failing(run_on_ranks):
    prepare("sdxl")
    run_on_ranks(check_state_is_reset, 2)


def check_synced_percent(rank, world_size):
    pipe = loaded("sdxl")
    with attached(
        pipe, {"synced_percent": 60, "warmup_steps": 1}, rank=rank, world_size=world_size
    ) as backend:
        result(pipe, request("sdxl", num_inference_steps=7))
        assert backend.report()["stale_evaluations"] == 7 - 4  # floor(4.2)
        result(pipe, request("sdxl", num_inference_steps=7, warmup_steps=2))
        assert backend.report()["stale_evaluations"] == 5  # the request comes first
        result(pipe, request("sdxl", num_inference_steps=7, warmup_steps=0))
        figures = backend.report()
        assert figures["stale_evaluations"] == 6  # the first evaluation is always synchronous
        assert 0 < figures["turn_bytes"] < figures["turn_bytes_if_all_outputs_were_broadcast"] / 3
        turns = figures["stale_evaluations"]
    gathered = [None] * world_size
    torch.distributed.all_gather_object(gathered, figures["sent_bytes"])
    assert sum(gathered) == turns * figures["turn_bytes"]


def test_synchronous_steps_are_counted_exactly_and_bytes_are_reported(run_on_ranks):
    prepare("sdxl")
    run_on_ranks(check_synced_percent, 2)
