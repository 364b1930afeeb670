"""What the plan of DistriFuser allows and refuses, and what a generation is refused for before
anything is sent.
"""

from typing import Any

import pytest

from backends.distrifuser.cuts import cut_of
from backends.distrifuser.plan import make_plan
from backends.errors import PlanError, UnsupportedError
from backends.model_table import read_table
from backends.parallel.base import RunInfo
from backends.parallel.patch_bounds import PatchBounds, TokenLayout
from backends.request import GenerateRequest
from tests.backends.distrifuser.driving import attached, build
from tests.checkpoints import load

TABLE = read_table()


@pytest.mark.parametrize(
    ("name", "options", "world_size", "axes"),
    [
        ("sdxl", {}, 2, (("cfg", 2), ("patch", 1))),
        ("sdxl", {}, 3, (("patch", 3),)),
        ("sdxl", {}, 4, (("cfg", 2), ("patch", 2))),
        ("sdxl", {"no_split_batch": True}, 4, (("patch", 4),)),
        ("flux", {}, 4, (("patch", 4),)),
        ("sdxl", {"parallelism": "tensor"}, 4, (("cfg", 2), ("tensor", 2))),
        ("sdxl", {}, 1, (("patch", 1),)),
        ("sdxl", {"patch_weights": "1.0,0.6", "no_split_batch": True}, 2, (("patch", 2),)),
    ],
)
def test_split_batch_comes_before_bands(name, options, world_size, axes):
    assert make_plan(TABLE[name], options, world_size).axes == axes


@pytest.mark.parametrize(
    ("options", "exactness"),
    [
        ({}, "approximate"),
        ({"sync_mode": "full_sync"}, "reordered"),
        ({"parallelism": "tensor"}, "reordered"),
        ({"parallelism": "naive_patch", "sync_mode": "full_sync"}, "approximate"),
        ({"sync_mode": "rotate"}, "approximate"),
    ],
)
def test_exactness_follows_the_mode(options, exactness):
    assert make_plan(TABLE["sdxl"], options, 3).exactness == exactness


@pytest.mark.parametrize(
    ("name", "options", "world_size", "message"),
    [
        (
            "sdxl",
            {"sync_mode": "sometimes"},
            2,
            r"sync_mode='sometimes' is not allowed. Allowed: corrected_async_gn, stale_gn, ",
        ),
        (
            "sdxl",
            {"parallelism": "rows"},
            2,
            r"parallelism='rows' is not allowed. Allowed: patch, naive_patch, tensor",
        ),
        (
            "sdxl",
            {"split_scheme": "diagonal"},
            2,
            r"split_scheme='diagonal' is not allowed. Allowed: row, col, alternate",
        ),
        (
            "sdxl",
            {"warm_up_steps": -1},
            2,
            r"warmup_steps=-1 is not allowed. Give a whole number from 0",
        ),
        (
            "sdxl",
            {"patch_weights": "1,-2"},
            2,
            r"patch_weights='1,-2' is not allowed. Give one positive number per rank",
        ),
        (
            "sdxl",
            {"patch_weights": "1,2"},
            2,
            r"patch_weights has 2 numbers, but each image is cut into 1 patches",
        ),
        (
            "sdxl",
            {"patch_weights": "1,2", "parallelism": "tensor"},
            4,
            r"patch_weights cannot be used with parallelism=tensor",
        ),
        (
            "sdxl",
            {"patch_weights": "1,2", "sync_mode": "rotate"},
            4,
            r"patch_weights cannot be used with sync_mode=rotate",
        ),
        (
            "flux",
            {"parallelism": "naive_patch", "split_scheme": "col"},
            2,
            r"split_scheme=col is not available for flux",
        ),
    ],
)
def test_rejects(name, options, world_size, message):
    with pytest.raises(PlanError, match=message):
        make_plan(TABLE[name], options, world_size)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split_scheme": "col"}, "split_scheme=col has no effect"),
        ({"extrapolate": True, "sync_mode": "rotate"}, "extrapolate has no effect"),
        ({"extrapolate": True, "parallelism": "tensor"}, "extrapolate has no effect"),
        ({}, "warmup_steps=4: the default"),
        (
            {"parallelism": "tensor", "sync_mode": "full_sync"},
            "no effect of parallelism=tensor and sync_mode=full_sync: the halves of guidance",
        ),
    ],
)
def test_says_what_it_chose_and_what_has_no_effect(options, reason):
    assert any(text.startswith(reason) for text in make_plan(TABLE["sdxl"], options, 2).reasons)


def test_one_rank_for_each_half_of_guidance_keeps_all_weights():
    options = {"parallelism": "tensor"}
    assert not make_plan(TABLE["sdxl"], options, 2).splits_weights_by
    assert make_plan(TABLE["sdxl"], options, 4).splits_weights_by == "--parallelism=tensor"


def run_of(height: int, width: int, *, order: int = 1, guidance: float = 5.0) -> RunInfo:
    return RunInfo(
        request=GenerateRequest(guidance_scale=guidance),
        height=height,
        width=width,
        num_inference_steps=2,
        order=order,
    )


def check_refusals(rank: int, world_size: int) -> None:
    patches = {"no_split_batch": True}
    refused: list[tuple[str, dict[str, Any], RunInfo, str]] = [
        (
            "sdxl",
            patches,
            run_of(32, 512),
            r"^4 latent rows cannot be cut into 2 patches: this model cuts at multiples of 4, so "
            r"at least 5",
        ),
        ("sdxl", {}, run_of(32, 512, guidance=1.0), "^4 latent rows cannot be cut into 2 patches"),
        (
            "sdxl",
            patches | {"parallelism": "naive_patch", "split_scheme": "col"},
            run_of(512, 32),
            "^4 latent columns cannot be cut",
        ),
        ("flux", {}, run_of(16, 16), "^1 tokens cannot be cut into 2 patches"),
        ("sd3", patches, run_of(16, 16), "^1 tokens cannot be cut into 2 patches"),
        ("sdup", patches, run_of(16, 64), "^4 latent rows cannot be cut into 2 patches"),
        (
            "sdxl",
            patches | {"extrapolate": True},
            run_of(512, 512, order=2),
            "^extrapolate=true is not available with a sampler of 2 evaluations",
        ),
    ]
    allowed = [
        ("sdxl", patches, run_of(40, 512)),
        ("sdxl", {}, run_of(32, 512)),
        ("flux", {}, run_of(16, 32)),
        ("sdup", patches, run_of(36, 64)),
        ("sdxl", patches, run_of(512, 512, order=2)),
        ("sdxl", patches | {"parallelism": "tensor"}, run_of(8, 8)),
    ]
    for name in ("sdxl", "flux", "sd3", "sdup"):
        pipe = load(name)
        for _, options, run, message in (case for case in refused if case[0] == name):
            with (
                attached(pipe, name, rank, world_size, **options) as backend,
                pytest.raises((PlanError, UnsupportedError), match=message),
            ):
                backend.check(run)
        for _, options, run in (case for case in allowed if case[0] == name):
            with attached(pipe, name, rank, world_size, **options) as backend:
                backend.check(run)
        if name == "sdxl":
            pipe.unet.compile()
            compiled = r"sync_mode=corrected_async_gn is not available with torch\.compile"
            with (
                attached(pipe, name, rank, world_size, **patches) as backend,
                pytest.raises(UnsupportedError, match=compiled),
            ):
                backend.check(run_of(512, 512))


def test_a_run_that_cannot_be_cut_or_followed_is_refused_before_anything_is_sent(run_on_ranks):
    build(["sdxl", "flux", "sd3", "sdup"])
    run_on_ranks(check_refusals, 2)


def check_exactness(rank: int, world_size: int) -> None:
    pipe = load("sdxl")
    patches = {"no_split_batch": True}
    expected: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"guidance_scale": 5.0}, "exact"),
        ({}, {"guidance_scale": 1.0}, "approximate"),  # no halves to split: patches over all ranks
        ({}, {"guidance_scale": 1.0, "quality": "exact"}, "reordered"),
        ({"sync_mode": "full_sync"}, {"guidance_scale": 1.0}, "reordered"),
        (patches, {}, "approximate"),
        (patches, {"warmup_steps": 2}, "reordered"),
        (patches | {"parallelism": "tensor"}, {}, "reordered"),
        (patches | {"parallelism": "naive_patch"}, {"quality": "exact"}, "approximate"),
    ]
    for options, fields, exactness in expected:
        run = RunInfo(
            request=GenerateRequest(**fields), height=128, width=64, num_inference_steps=2
        )
        with attached(
            pipe, "sdxl", rank, world_size, **({"warm_up_steps": 1} | options)
        ) as backend:
            assert backend.exactness_of(run) == exactness, f"{options} {fields}"
    with attached(pipe, "sdxl", rank, world_size, **patches) as backend:
        backend.begin(
            RunInfo(
                request=GenerateRequest(warmup_steps=1),
                height=128,
                width=64,
                num_inference_steps=3,
                order=2,
            )
        )
        for _ in range(5):
            backend.step_done()
        assert backend.report()["synchronous_steps"] == 2, (
            "one step of a sampler of order 2 is two evaluations"
        )
        backend.end()


def test_a_run_says_how_close_it_comes_to_one_rank(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_exactness, 2)


def check_too_many_ranks_for_the_weights(rank: int, world_size: int) -> None:
    message = (
        "^parallelism=tensor cannot cut this model into 3 parts: neither its attention "
        "heads "
        "nor its feed-forward widths divide by 3"
    )
    with (
        pytest.raises(PlanError, match=message),
        attached(load("sd1"), "sd1", rank, world_size, parallelism="tensor"),
    ):
        pass


def test_weights_that_do_not_divide_by_the_ranks_are_refused(run_on_ranks):
    build(["sd1"])
    run_on_ranks(check_too_many_ranks_for_the_weights, 3)


def test_a_network_that_nobody_described_is_refused():
    with pytest.raises(
        UnsupportedError,
        match="a AutoencoderKL cannot be cut into patches: it is neither a UNet nor one of",
    ):
        cut_of(load("sd1").vae)


def test_an_attention_over_fewer_tokens_than_the_patch_is_refused():
    layout = TokenLayout(PatchBounds((0, 6, 10)), patch=0)
    assert layout.tokens(6).sizes == (6, 4)
    with pytest.raises(
        PlanError, match="an attention layer has 5 tokens, fewer than this rank's 6"
    ):
        layout.tokens(5)
