"""full_sync, the CFG split and tensor parallelism equal one rank: every model type, with and
without guidance, even and uneven patches, two sizes in a row, one and two prompts."""

from typing import Any

import pytest

from tests.backends.distrifuser.driving import (
    arguments,
    assert_same,
    attached,
    build,
    generate,
    load_wide,
    table,
    unguided,
)
from tests.backends.reference import from_rank_zero

UNETS = ("sd1", "sd2", "sdxl", "sdup", "svd", "ad")
TRANSFORMERS = ("flux", "sd3", "pixa", "pixs", "hy")
BANDS = {"sync_mode": "full_sync", "no_split_batch": True}
SPLIT_BATCH = {"sync_mode": "full_sync"}
TENSOR = {"parallelism": "tensor", "no_split_batch": True}


def requests(name: str, world_size: int) -> dict[str, dict[str, Any]]:
    """Rows (tokens) of the first size divide by the ranks, those of the second do not."""
    rows, columns = 8 * world_size, 8
    other = (
        {"rows": rows - 3, "columns": 6}
        if table()[name].denoiser == "unet"
        else {"rows": rows - 6, "columns": 6}
    )
    return {
        "guided": arguments(name, rows=rows, columns=columns),
        "two prompts, other size": arguments(name, prompts=2, **other, **unguided(name)),
        "unguided": arguments(name, rows=rows, columns=columns, **unguided(name)),
    }


def check_types(
    rank: int,
    world_size: int,
    names: tuple[str, ...],
    *option_sets: dict[str, Any],
    is_brief: bool = False,
) -> None:
    for name in names:
        pipe = load_wide(name)
        labels = list(requests(name, world_size))[: 2 if is_brief else None]
        cases = {
            label: given for label, given in requests(name, world_size).items() if label in labels
        }
        alone = from_rank_zero(lambda: [generate(pipe, None, given) for given in cases.values()])
        wanted = {
            label: (given, want) for (label, given), want in zip(cases.items(), alone, strict=True)
        }
        for options in option_sets:
            with attached(pipe, name, rank, world_size, **options) as backend:
                for label, (given, want) in wanted.items():
                    backend.mesh.traffic.reset()
                    assert_same(generate(pipe, backend, given), want, f"{name} {options} {label}")
                    assert backend.mesh.traffic.messages > 0 or world_size == 1, (
                        f"{name} {options} {label}: nothing was exchanged"
                    )
        given, want = wanted["guided"]
        assert_same(generate(pipe, None, given), want, f"{name} after detach")


def check_types_briefly(
    rank: int, world_size: int, names: tuple[str, ...], *option_sets: dict[str, Any]
) -> None:
    check_types(rank, world_size, names, *option_sets, is_brief=True)


@pytest.mark.parametrize(
    "names", [("sd1", "sd3"), pytest.param(("ad", "hy"), marks=pytest.mark.slow)], ids=",".join
)
def test_bands_on_two_ranks_match_one_rank(run_on_ranks, names):
    build(names)
    run_on_ranks(check_types_briefly, 2, names, BANDS)


def test_split_batch_and_uneven_bands_on_two_ranks_match_one_rank(run_on_ranks):
    names = ("sdxl", "flux")
    build(names)
    run_on_ranks(check_types, 2, names, SPLIT_BATCH, BANDS | {"patch_weights": "3,1"})


@pytest.mark.slow
def test_bands_of_sdxl_on_three_ranks_match_one_rank(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_types_briefly, 3, ("sdxl",), BANDS | {"patch_weights": "1,2,1"})


@pytest.mark.slow
def test_split_batch_and_bands_of_sdxl_on_four_ranks_match_one_rank(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_types, 4, ("sdxl",), SPLIT_BATCH | {"patch_weights": "1,2"})


def test_one_rank_needs_no_exchange(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_types_briefly, 1, ("sdxl",), {}, {"parallelism": "tensor"})


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", [*UNETS, *TRANSFORMERS])
def test_bands_split_batch_and_weights_match_one_rank_for_every_type(
    run_on_ranks, name, world_size
):
    build([name])
    options = (
        BANDS,
        SPLIT_BATCH,
        BANDS | {"patch_weights": ",".join(str(rank % 2 + 1) for rank in range(world_size))},
    )
    run_on_ranks(check_types, world_size, (name,), *options)


@pytest.mark.slow
def test_tensor_parallelism_on_two_ranks_matches_one_rank(run_on_ranks):
    names = ("sdxl", *TRANSFORMERS)
    build(names)
    run_on_ranks(check_types_briefly, 2, names, TENSOR)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_tensor_parallelism_matches_one_rank_for_every_type(run_on_ranks, world_size):
    build([*UNETS, *TRANSFORMERS])
    run_on_ranks(check_types, world_size, (*UNETS, *TRANSFORMERS), TENSOR)
