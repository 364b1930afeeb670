"""PipeFusion: equal to single while synchronous, to the one-process simulation afterwards; light on
weights, safe to interrupt.
"""

import pytest
import torch

from backends.errors import CancelledError, PlanError, RequestError, UnsupportedError
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.weight_shards import weight_bytes
from backends.xdit.stages import PipeFusion, stage_bounds
from tests.backends.reference import from_rank_zero
from tests.backends.xdit.ranks import assert_close, attached, generated, latents_of, run_of
from tests.backends.xdit.simulation import simulate
from tests.checkpoints import SD35_MEDIUM, load

TYPES = {
    "sd3": ("sd3", {}),
    "sd3.5-medium": ("sd3", SD35_MEDIUM),
    "flux": ("flux", {}),
    "pixa": ("pixa", {}),
    "pixs": ("pixs", {}),
}
STEPS = 4
LATE_STEPS = {"num_pipeline_patch": 3, "warmup_steps": 1}
ON_2 = [{"pipefusion_parallel_degree": 2}]
ON_4 = [
    {"pipefusion_parallel_degree": 4},
    {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True},
    {"pipefusion_parallel_degree": 2, "ulysses_degree": 2},
    {"pipefusion_parallel_degree": 2, "ring_degree": 2},
]


def simulated(name, variant, size, **arguments):
    pipe = load(name, **variant)
    simulate(pipe.transformer, name, num_patches=3, warmup_steps=1)
    return latents_of(pipe, name, size=size, steps=STEPS, **arguments)


def check_matches_simulation(rank, world_size, name, variant, sets):
    pipe = load(name, **variant)
    single = from_rank_zero(lambda: latents_of(pipe, name, steps=STEPS))
    stale = from_rank_zero(lambda: {size: simulated(name, variant, size) for size in (64, 80)})
    assert (
        single - stale[64]
    ).abs().max() > 1e-3 * single.abs().max()  # staleness shows, so the test can fail
    for options in sets:
        if options.get("use_cfg_parallel") and name == "flux":
            continue
        with attached(pipe, name, rank, world_size, **options, **LATE_STEPS) as backend:
            for size in (64, 80):
                assert_close(
                    generated(backend, pipe, name, size=size, steps=STEPS),
                    stale[size],
                    (options, size),
                )
            synchronous = generated(backend, pipe, name, steps=STEPS, warmup_steps=STEPS)
            assert_close(synchronous, single, (options, "all steps synchronous"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case in ("sd3.5-medium", "pixs") else case
        for case in TYPES
    ],
)
def test_two_stages_match_the_simulation(run_on_ranks, case):
    run_on_ranks(check_matches_simulation, 2, *TYPES[case], ON_2)


@pytest.mark.parametrize(
    "case",
    ["sd3", *(pytest.param(case, marks=pytest.mark.slow) for case in TYPES if case != "sd3")],
)
def test_four_ranks_with_stages_match_the_simulation(run_on_ranks, case):
    run_on_ranks(check_matches_simulation, 4, *TYPES[case], ON_4)


def check_overlap(rank, world_size, options, num_halves):
    """num_halves: of guidance in one call."""
    pipe = load("sd3")
    present = []
    with attached(pipe, "sd3", rank, world_size, **options, **LATE_STEPS) as backend:
        method, is_first = backend._pipefusions[0], backend.mesh.axis("stage").rank == 0

        def note(forward, *args, **kwargs):
            present.append(len(method._input._filled) if method._input is not None else None)
            return forward(*args, **kwargs)

        hooks.attach(pipe.transformer.transformer_blocks[0], "note", note)
        generated(backend, pipe, "sd3", steps=3)
        hooks.detach(pipe.transformer.transformer_blocks[0], "note")
    # one pass for each half in the synchronous step, three patches in the next, whose input is
    # whole; then they come one by one. the last stage has made the prediction itself
    last_step = (
        [patch for patch in (1, 2, 3) for _ in range(num_halves)]
        if is_first
        else [None] * 3 * num_halves
    )
    assert present == [None] * 4 * num_halves + last_step


@pytest.mark.parametrize(
    ("world_size", "options", "num_halves"),
    [(2, ON_2[0], 2), (4, ON_4[1], 1)],
    ids=["alone", "cfg"],
)
def test_the_first_stage_begins_a_step_with_the_patches_that_are_there(
    run_on_ranks, world_size, options, num_halves
):
    run_on_ranks(check_overlap, world_size, options, num_halves)


def check_ranks_apart(rank, world_size):
    """Both halves of guidance: rank 0 alone looks at each step's latents, as for previews; and an
    image without guidance, unsplit.
    """

    def look(pipe, step, timestep, kwargs):
        if rank == 0:
            assert kwargs["latents"].isfinite().all()
        return {}

    want = from_rank_zero(
        lambda: [simulated("sd3", {}, 64, guidance_scale=scale) for scale in (5.0, 1.0)]
    )
    pipe = load("sd3")
    with attached(pipe, "sd3", rank, world_size, **ON_4[1], **LATE_STEPS) as backend:
        for scale, latents in zip((5.0, 1.0), want, strict=True):
            assert_close(
                generated(
                    backend,
                    pipe,
                    "sd3",
                    steps=STEPS,
                    guidance_scale=scale,
                    callback_on_step_end=look,
                ),
                latents,
                scale,
            )


def test_stages_of_both_halves_wait_for_no_rank_that_looks_at_its_latents(run_on_ranks):
    run_on_ranks(check_ranks_apart, 4)


def check_weights(rank, world_size, name):
    pipe = load(name)
    whole = weight_bytes(pipe.transformer)
    blocks = list(pipe.transformer.transformer_blocks)
    in_blocks = [weight_bytes(block) for block in blocks]
    want = from_rank_zero(lambda: latents_of(pipe, name, steps=2))
    with attached(pipe, name, rank, world_size, pipefusion_parallel_degree=world_size):
        mine = in_blocks[len(blocks) * rank // world_size : len(blocks) * (rank + 1) // world_size]
        placeholders = weight_bytes(pipe.transformer) - (whole - sum(in_blocks) + sum(mine))
        assert 0 < placeholders < 0.01 * whole  # one number for each tensor of the other stages
        assert sum(mine) < 1.2 * sum(in_blocks) / world_size
    assert weight_bytes(pipe.transformer) == whole
    assert_close(latents_of(pipe, name, steps=2), want, "the other stages' weights are back")


@pytest.mark.parametrize(
    ("name", "world_size"), [("sd3", 2), pytest.param("pixa", 4, marks=pytest.mark.slow)]
)
def test_a_rank_keeps_the_weights_of_its_own_stage_only(run_on_ranks, name, world_size):
    run_on_ranks(check_weights, world_size, name)


def check_blocks_per_stage(rank, world_size):
    want = from_rank_zero(lambda: simulated("sd3", {}, 64))
    pipe = load("sd3")
    options = {"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": "3,1", **LATE_STEPS}
    with attached(pipe, "sd3", rank, world_size, **options) as backend:
        assert_close(generated(backend, pipe, "sd3", steps=STEPS), want)
        assert [weight_bytes(block) > 10_000 for block in pipe.transformer.transformer_blocks] == [
            rank == 0
        ] * 3 + [rank == 1]


def test_blocks_per_stage_can_be_given(run_on_ranks):
    run_on_ranks(check_blocks_per_stage, 2)


class StopHereError(Exception):
    """What the injected failure raises."""


def check_interruptions(rank, world_size, name, options):
    """A cancelled job, and a failure inside a pass on one rank, are followed by a right image."""
    pipe = load(name)
    is_stale = "pipefusion_parallel_degree" in options
    want = from_rank_zero(
        lambda: simulated(name, {}, 64) if is_stale else latents_of(pipe, name, steps=STEPS)
    )

    def cancel(pipe, step, timestep, kwargs):
        if step == 1:
            raise CancelledError("the job was cancelled at step 2 of 4.")
        return {}

    with attached(pipe, name, rank, world_size, **options) as backend:
        with pytest.raises(CancelledError):
            generated(backend, pipe, name, steps=STEPS, callback_on_step_end=cancel)
        assert_close(generated(backend, pipe, name, steps=STEPS), want, "after a cancelled job")

        block = pipe.transformer.transformer_blocks[-1 if rank == 1 else 0]  # of its own stage
        calls = 0

        def fail(forward, *args, **kwargs):
            nonlocal calls
            calls += 1
            if rank == 1 and calls == (
                6 if is_stale else 4
            ):  # under stages: when patches are on their way back
                raise StopHereError
            return forward(*args, **kwargs)

        hooks.attach(block, "failure", fail)
        failure = None
        try:
            generated(backend, pipe, name, steps=STEPS)
        except (StopHereError, RuntimeError) as error:
            # the error itself would keep frames alive, and with them the group that others wait in
            failure = type(error)
        backend.mesh.destroy()  # as a host does: it wakes the ranks that wait for this one
        assert failure is not None and (failure is StopHereError) == (rank == 1)
        hooks.detach(block, "failure")
        torch.distributed.barrier()
        backend.mesh.rebuild()
        assert_close(
            generated(backend, pipe, name, steps=STEPS), want, "after a failure of one rank"
        )


@pytest.mark.parametrize(
    ("world_size", "name", "options"),
    [
        (2, "sd3", {"ulysses_degree": 2}),
        (2, "sd3", {**ON_2[0], **LATE_STEPS}),
        pytest.param(4, "sd3", {**ON_4[1], **LATE_STEPS}, marks=pytest.mark.slow),
        *(
            pytest.param(
                2,
                "flux" if method == "tensor_parallel_degree" else "sd3",
                {method: degree},
                marks=pytest.mark.slow,
            )
            for method, degree in [
                ("use_cfg_parallel", True),
                ("ring_degree", 2),
                ("data_parallel_degree", 2),
                ("tensor_parallel_degree", 2),
            ]
        ),
    ],
    ids=["ulysses", "pipefusion", "cfg and pipefusion", "cfg", "ring", "data", "tensor"],
)
def test_next_image_is_right_after_cancelling_and_after_a_failure(
    run_on_ranks, world_size, name, options
):
    run_on_ranks(check_interruptions, world_size, name, options)


def check_guidance_switched_off(rank, world_size):
    """The batch changes from two to one in the middle: what was remembered of two no longer
    fits.
    """

    def stop_guidance(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 1.0
            return {
                name: kwargs[name].chunk(2)[-1]
                for name in ("prompt_embeds", "pooled_prompt_embeds")
            }
        return {}

    watch = {
        "callback_on_step_end": stop_guidance,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }
    want = latents_of(load("sd3"), "sd3", steps=3, **watch)
    pipe = load("sd3")
    with attached(
        pipe, "sd3", rank, world_size, pipefusion_parallel_degree=2, warmup_steps=2
    ) as backend:
        assert_close(generated(backend, pipe, "sd3", steps=3, **watch), want)


def test_a_batch_that_changes_under_way_is_computed_synchronously_once(run_on_ranks):
    run_on_ranks(check_guidance_switched_off, 2)


def check_refusals(rank, world_size):
    pipe = load("sd3")
    with attached(pipe, "sd3", rank, world_size, pipefusion_parallel_degree=2) as backend:
        backend.check(run_of(warmup_steps=1))
        with pytest.raises(
            RequestError,
            match=r"warmup_steps=0 is not available with PipeFusion: .* Allowed: 1 or more",
        ) as caught:
            backend.check(run_of(warmup_steps=0))
        assert caught.value.field == "warmup_steps"
        mesh: Mesh = backend.mesh
        with pytest.raises(
            UnsupportedError,
            match=r"not available for HunyuanDiT2DModel: its later blocks .* Use --ulysses_degree",
        ):
            PipeFusion(load("hy").transformer, mesh, num_patches=2, blocks_per_stage=None)


def test_rejects_a_request_without_synchronous_steps_and_models_with_long_skips(run_on_ranks):
    run_on_ranks(check_refusals, 2)


def test_rejects_blocks_that_the_stages_do_not_divide():
    assert stage_bounds(5, 2, None) == (0, 2, 5)
    with pytest.raises(
        PlanError,
        match=(
            r"\[3, 1\] does not divide 5 transformer blocks among 2 stages. Allowed: 2 numbers "
            r"from 1 with the sum 5. Change them"
        ),
    ):
        stage_bounds(5, 2, (3, 1))
