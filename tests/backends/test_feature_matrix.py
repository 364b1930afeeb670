"""Every feature with every backend: the option changes the result, and two ranks compute with it
what one device does.

The cells come from the model table, so that writing `tested` there is what makes this run.
"""

import pytest
import torch
import torch._dynamo

from backends.loading.offload import offload
from backends.model_table import FEATURES
from tests.backends.features import (
    CPU,
    STEPS,
    TABLE,
    attached,
    combined,
    loaded,
    meshes,
    num_graphs,
    prepare,
    request_for,
    result,
)

PARALLEL = ("asyncdiff", "distrifuser", "xdit")


def cells(name):
    """Feature -> the parallel backends that have it for this type."""
    spec = TABLE[name]
    found = {}
    for what in FEATURES:
        found[what] = [
            backend for backend in PARALLEL if spec.supports(backend, what).status == "tested"
        ]
    # segments take the cache that they know nothing of, and no other
    found["prediction"] = found["step_cache"]
    found["step_cache"] = [backend for backend in found["step_cache"] if backend != "asyncdiff"]
    return {what: backends for what, backends in found.items() if backends}


def check_type(rank, world_size, name, wanted):
    spec = TABLE[name]
    backends = [backend for backend in PARALLEL if backend in spec.backends]
    with_mesh = meshes(spec, backends, rank, world_size)
    plain_pipe = loaded(spec)
    plain = result(plain_pipe, request_for(spec))
    for backend in backends:
        compare(plain_pipe, with_mesh[backend], request_for(spec), plain, f"{name} {backend}")
    assert_same(
        result(plain_pipe, request_for(spec)), plain, f"{name}: after all backends were detached"
    )
    for what, its_backends in wanted.items():
        case = combined(what.split(" + "), spec)
        pipe = loaded(spec, **case.load)
        if what == "offload":
            offload(
                pipe.pipe, spec, "model", device=CPU
            )  # a host without an accelerator would only say that it has no effect
        steps = {"num_inference_steps": case.steps, "warmup_steps": case.steps}
        asked = request_for(spec, **steps, **case.request)
        want = result(pipe, asked)
        without = plain if case.steps == STEPS else result(plain_pipe, request_for(spec, **steps))
        change = float((want - without).abs().max())
        assert (change > case.visible) == case.changes_result, (
            f"{name} {what}: changes the result by {change:.1e}"
        )
        for backend in its_backends:
            compare(pipe, with_mesh[backend], asked, want, f"{name} {what} {backend}")
        assert_same(result(pipe, asked), want, f"{name} {what}: after all backends were detached")


def compare(pipe, mesh, asked, want, label):
    before = num_graphs()
    with attached(pipe, mesh):
        got = result(pipe, asked)
        if pipe.load.compile is not None:
            graphs = num_graphs()
            result(pipe, asked)
            assert graphs > before, f"{label}: nothing was compiled"
            assert num_graphs() == graphs, f"{label}: the same size was compiled again"
            torch._dynamo.reset()
    assert_same(got, want, label)


def assert_same(got, want, label):
    limit = max(
        1e-5,
        1e-4 * float(want.abs().max()),
        1.01 / 255 if want.dim() == 4 and want.shape[-1] == 3 else 0,
    )
    difference = float((got - want).abs().max())
    assert torch.isfinite(got).all() and difference <= limit, (
        f"{label}: off by {difference:.1e}, allowed {limit:.1e}"
    )


TOGETHER = "lora + controlnet + ip_adapter"
BUT_COMPILE = [
    what for what in [*FEATURES, "prediction"] if what != "compile"
]  # tracing a whole UNet takes as long as everything else together


@pytest.mark.timeout(400)
def test_two_ranks_equal_one_device_with_each_feature_of_sdxl(run_on_ranks):
    """Each on one backend, and every backend in its turn; three of them are tested together on all,
    and every cell is in the long tail.
    """
    found = {
        what: backends
        for what, backends in cells("sdxl").items()
        if what in BUT_COMPILE and what not in TOGETHER.split(" + ")
    }
    wanted = {
        what: [backends[turn % len(backends)]]
        for turn, (what, backends) in enumerate(found.items())
    }
    assert {backend for (backend,) in wanted.values()} == set(PARALLEL) & set(
        TABLE["sdxl"].backends
    )
    prepare(TABLE["sdxl"], wanted)
    run_on_ranks(check_type, 2, "sdxl", wanted)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("sdxl", BUT_COMPILE),
        ("sdxl", ["compile"]),
        *((name, [*FEATURES, "prediction"]) for name in TABLE if name != "sdxl"),
    ],
)
def test_two_ranks_equal_one_device_with_every_feature(run_on_ranks, name, features):
    wanted = {what: backends for what, backends in cells(name).items() if what in features}
    prepare(TABLE[name], wanted)
    run_on_ranks(check_type, 2, name, wanted)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("sdxl", TOGETHER),
        ("flux", "gguf + lora"),
        pytest.param(
            "sdxl", "quantization + lora + compile", marks=pytest.mark.slow
        ),  # tracing packed layers with LoRA takes a minute
    ],
)
def test_two_ranks_equal_one_device_with_features_together(run_on_ranks, name, what):
    prepare(TABLE[name], what.split(" + "))
    run_on_ranks(
        check_type,
        2,
        name,
        {what: [backend for backend in PARALLEL if backend in TABLE[name].backends]},
    )
