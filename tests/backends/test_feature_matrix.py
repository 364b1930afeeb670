"""Every feature with every backend: the option changes the result, and two ranks compute with it what one device does.

The cells come from the model table, so that writing `tested` there is what makes this run.
"""

import pytest
import torch
import torch._dynamo

from backends.model_table import FEATURES
from backends.offload import offload
from tests.backends.features import CPU, STEPS, TABLE, attached, combined, loaded, meshes, prepare, request_for, result

FAST = ("sdxl", "flux")
PARALLEL = ("asyncdiff", "distrifuser", "xdit")


def cells(name):
    """Feature -> the parallel backends that have it for this type."""
    spec = TABLE[name]
    found = {}
    for what in FEATURES:
        found[what] = [backend for backend in PARALLEL if spec.supports(backend, what).status == "tested"]
    return {what: backends for what, backends in found.items() if backends}


def check_type(rank, world_size, name, wanted):
    spec = TABLE[name]
    backends = [backend for backend in PARALLEL if backend in spec.backends]
    with_mesh = meshes(spec, backends, rank, world_size)
    plain_pipe = loaded(spec)
    plain = result(plain_pipe, request_for(spec))
    for backend in backends:
        compare(plain_pipe, with_mesh[backend], request_for(spec), plain, f"{name} {backend}")
    for what, its_backends in wanted.items():
        case = combined(what.split(" + "), spec)
        pipe = loaded(spec, **case.load)
        if what == "offload":
            offload(pipe.pipe, spec, "model", device=CPU)  # a host without an accelerator would only say that it has no effect
        steps = {"num_inference_steps": case.steps, "warmup_steps": case.steps}
        asked = request_for(spec, **steps, **case.request)
        want = result(pipe, asked)
        without = plain if case.steps == STEPS else result(plain_pipe, request_for(spec, **steps))
        change = float((want - without).abs().max())
        assert (change > case.visible) == case.changes_result, f"{name} {what}: changes the result by {change:.1e}"
        for backend in its_backends:
            compare(pipe, with_mesh[backend], asked, want, f"{name} {what} {backend}")


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
    limit = max(1e-5, 1e-4 * float(want.abs().max()), 1.01 / 255 if want.dim() == 4 and want.shape[-1] == 3 else 0)
    difference = float((got - want).abs().max())
    assert torch.isfinite(got).all() and difference <= limit, f"{label}: off by {difference:.1e}, allowed {limit:.1e}"
    assert float((result(pipe, asked) - want).abs().max()) <= limit, f"{label}: detaching left something behind"


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


OTHERS = [name for name in TABLE if name not in FAST]
BUT_COMPILE = [what for what in FEATURES if what != "compile"]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "features"),
    # tracing a whole UNet takes as long as everything else together
    [("sdxl", BUT_COMPILE), slow("flux", FEATURES), slow("sdxl", ["compile"]), *(slow(name, FEATURES) for name in OTHERS)],
)
def test_two_ranks_equal_one_device_with_every_feature(run_on_ranks, name, features):
    wanted = {what: backends for what, backends in cells(name).items() if what in features}
    prepare(TABLE[name], wanted)
    run_on_ranks(check_type, 2, name, wanted)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("sdxl", "lora + controlnet + ip_adapter"),
        ("flux", "gguf + lora"),
        pytest.param("sdxl", "quantization + lora + compile", marks=pytest.mark.slow),  # tracing packed layers with LoRA takes a minute
    ],
)
def test_two_ranks_equal_one_device_with_features_together(run_on_ranks, name, what):
    prepare(TABLE[name], what.split(" + "))
    run_on_ranks(check_type, 2, name, {what: [backend for backend in PARALLEL if backend in TABLE[name].backends]})
