"""full_sync on several ranks equals one rank: every model type, guidance, uneven bands, changing sizes, several prompts."""

from typing import Any

import pytest

from tests.backends.distrifuser.driving import arguments, assert_same, attached, build, generate
from tests.checkpoints import load

UNETS = ("sd1", "sd2", "sdxl", "sdup", "svd", "ad")
FULL = {"sync_mode": "full_sync", "no_split_batch": True}


def check_types(rank: int, world_size: int, names: tuple[str, ...], height: int, options: dict[str, Any]) -> None:
    for name in names:
        pipe = load(name)
        given = arguments(name, height=height * 2 if name == "sdup" else height)
        want = generate(pipe, None, given)
        with attached(pipe, name, rank, world_size, **options) as backend:
            assert_same(generate(pipe, backend, given), want)
        assert_same(generate(pipe, None, given), want, relative=0)


@pytest.mark.parametrize(("world_size", "height"), [(2, 128), (3, 200), (4, 256)])
def test_full_sync_of_every_unet_matches_one_rank(run_on_ranks, world_size, height):
    build(UNETS)
    run_on_ranks(check_types, world_size, UNETS, height, FULL)
