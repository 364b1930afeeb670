"""Reference images beside the latents: every backend on two ranks computes what one device does."""

import pytest

from tests.backends.features import TABLE, attached, loaded, meshes, prepare, request_for, result
from tests.backends.test_feature_matrix import PARALLEL, assert_same
from tests.checkpoints import NAMES, sample_image


def check_backends(rank, world_size, name):
    spec = TABLE[name]
    backends = [backend for backend in PARALLEL if backend in spec.backends]
    with_mesh = meshes(spec, backends, rank, world_size)
    pipe = loaded(spec)
    asked = request_for(spec, image=sample_image(64))
    want = result(pipe, asked)
    another = request_for(spec, image=sample_image(64, seed=1))
    assert (result(pipe, another) - want).abs().max() > 0.02
    for backend in backends:
        with attached(pipe, with_mesh[backend]):
            got = result(pipe, asked)
        assert_same(got, want, f"{name} {backend}")


@pytest.mark.parametrize(
    "name",
    [
        name if name in NAMES else pytest.param(name, marks=pytest.mark.slow)
        for name, spec in TABLE.items()
        if spec.images
    ],
)
def test_two_ranks_equal_one_device(run_on_ranks, name):
    prepare(TABLE[name], [])
    run_on_ranks(check_backends, 2, name)
