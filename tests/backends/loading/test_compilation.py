"""torch.compile: equal images, one graph per size, the right parts, and LoRA made part of the
weights first.
"""

import shutil

import pytest
import torch
import torch._dynamo

from backends.errors import ConfigError, UnsupportedError
from backends.groups.mesh import Mesh
from backends.loading.compilation import NAME, Compilation, _compiled
from backends.loading.offload import offload
from backends.model_table import read_table
from backends.parallel import hooks
from backends.parallel.regions import quiet_regions
from backends.quantization_spec import QuantizationSpec
from backends.request import CompileSettings
from backends.single.backend import SingleBackend
from backends.single.plan import make_plan
from tests.backends.features import CPU, TABLE, loaded, num_graphs, request_for, result
from tests.backends.loading.test_adapters import difference, draw
from tests.checkpoints import load, lora


def attached(name, *targets, load=None, **settings):
    """A pipeline of this type on one device, to be compiled; eager keeps the arithmetic and traces
    all the same.
    """
    compile_settings = CompileSettings(targets=targets, **{"backend": "eager", **settings})
    pipe = loaded(TABLE[name], compile=compile_settings, **(load or {}))
    plan = make_plan(TABLE[name], {}, 1)
    pipe.attach(SingleBackend(spec=TABLE[name], plan=plan, mesh=Mesh(plan, rank=0, device=CPU)))
    return pipe


@pytest.fixture(autouse=True)
def _fresh_counters():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_text_encoders_whose_hidden_states_are_asked_for_are_compiled_too():
    want = draw(loaded(TABLE["sdxl"]))
    pipe = attached("sdxl", "encoders")
    assert difference(draw(pipe), want) <= 1
    assert num_graphs() > 0


def test_options_that_torch_refuses_are_told_before_the_first_request():
    options = {"max_autotune": "yes"}
    with pytest.raises(ConfigError, match=r"--compile_options=.* got str should be bool"):
        attached("pixa", "denoiser", backend=None, options=options)


@pytest.mark.parametrize("target", ["denoiser", "vae", "encoders"])
def test_each_target_is_compiled_once_per_size_and_draws_the_same(target):
    want = draw(loaded(TABLE["pixa"]))
    pipe = attached("pixa", target)
    assert difference(draw(pipe), want) <= 1
    first = num_graphs()
    assert first > 0
    draw(pipe, num_inference_steps=3, seed=5)
    assert num_graphs() == first  # steps, seed and prompt are no new size
    draw(pipe, height=80)
    per_size = num_graphs() - first
    assert per_size <= first
    draw(pipe, height=80)
    draw(pipe)
    assert num_graphs() == first + per_size


@pytest.mark.parametrize(
    "name",
    [
        "zimage",
        "wan22_t2v",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name, spec in TABLE.items()
            if name not in ("zimage", "wan22_t2v")
            and spec.supports("single", "compile").status == "tested"
        ),
    ],
)
def test_the_whole_denoiser_of_every_type_is_compiled(name):
    asked = request_for(TABLE[name])
    want = result(loaded(TABLE[name]), asked)
    pipe = attached(name, "denoiser")
    torch.testing.assert_close(result(pipe, asked), want, rtol=1e-4, atol=1e-4)
    parts = [getattr(pipe.pipe, part, None) for part in TABLE[name].denoisers]
    assert all(NAME in hooks.attached(part) for part in parts if part is not None)
    graphs = num_graphs()
    assert graphs > 0
    result(pipe, asked)
    assert num_graphs() == graphs


def test_a_denoiser_is_compiled_in_half_precision_too():
    want = draw(loaded(TABLE["sd3"], variant="bf16"))
    assert difference(draw(attached("sd3", "denoiser", load={"variant": "bf16"})), want) <= 1
    assert num_graphs() > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for the CPU")
def test_inductor_draws_the_same():
    pipe = attached("pixa", "denoiser", backend=None)
    assert difference(draw(pipe), draw(loaded(TABLE["pixa"]))) <= 1
    assert num_graphs() > 0


def test_detaching_leaves_plain_modules():
    pipe = attached("pixa", "denoiser", "vae", "encoders")
    pipe.detach()
    draw(pipe)
    assert num_graphs() == 0


def test_loras_are_fused_before_compiling_and_a_request_can_bring_none():
    scales = {str(lora("pixa")): 0.8, str(lora("pixa", seed=1)): -0.5}
    want = draw(loaded(TABLE["pixa"], lora=scales))
    pipe = attached("pixa", "denoiser", load={"lora": scales})
    assert not [name for name, _ in pipe.pipe.transformer.named_modules() if "lora" in name]
    assert difference(draw(pipe), want) <= 1
    with pytest.raises(
        UnsupportedError,
        match="lora in a request is not available on a host that compiles its denoiser",
    ):
        draw(pipe, lora={})


def test_loras_stay_beside_packed_weights_which_cannot_take_them_in():
    extra = {
        "quantize": {"denoiser": QuantizationSpec(kind="int8")},
        "lora": {str(lora("pixa")): 0.8},
    }
    want = draw(loaded(TABLE["pixa"], **extra))
    pipe = attached("pixa", "denoiser", load=extra)
    assert [name for name, _ in pipe.pipe.transformer.named_modules() if "lora_A" in name]
    assert difference(draw(pipe), want) <= 1


def test_loras_are_fused_into_weights_that_wait_in_main_memory():
    extra = {"lora": {str(lora("pixa")): 0.8}}
    want = draw(loaded(TABLE["pixa"], **extra))
    settings = CompileSettings(targets=("denoiser",), backend="eager")
    pipe = loaded(TABLE["pixa"], compile=settings, offload="model", **extra)
    offload(pipe.pipe, TABLE["pixa"], "model", device=CPU)  # the host only does so with a GPU
    plan = make_plan(TABLE["pixa"], {}, 1)
    pipe.attach(SingleBackend(spec=TABLE["pixa"], plan=plan, mesh=Mesh(plan, rank=0, device=CPU)))
    assert pipe.loras.is_fused and difference(draw(pipe), want) <= 1


def test_settings_reach_torch(monkeypatch):
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda forward, **kwargs: seen.update(kwargs) or forward)
    draw(attached("pixa", "denoiser", backend=None, mode="max-autotune", fullgraph=False))
    assert seen == {
        "backend": "inductor",
        "fullgraph": False,
        "dynamic": False,
        "mode": "max-autotune",
    }
    seen.clear()
    draw(attached("pixa", "denoiser", mode="max-autotune", options={"a": 1}))
    assert seen == {"backend": "eager", "fullgraph": True, "dynamic": False, "options": {"a": 1}}


def test_limits_are_dynamos():
    config = torch._dynamo.config
    settings = CompileSettings(
        targets=(), cache_limit=3, accumulated_cache_limit=7, capture_scalar=True
    )
    before = {
        name: getattr(config, name)
        for name in ("recompile_limit", "accumulated_recompile_limit", "capture_scalar_outputs")
    }
    with config.patch(before):
        Compilation(settings).attach(None, read_table()["pixa"], [])
        assert (
            config.recompile_limit,
            config.accumulated_recompile_limit,
            config.capture_scalar_outputs,
        ) == (3, 7, True)
    assert {name: getattr(config, name) for name in before} == before


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_quiet_regions_hold_no_operator_that_sees_other_ranks(name):
    pipe = load(name)
    denoiser = pipe.transformer if name == "flux" else pipe.unet
    regions = quiet_regions(denoiser)
    kinds = {type(part).__name__ for region in regions for part in region.modules()}
    assert len(regions) > 4 and "FeedForward" in kinds
    assert not kinds & {"Attention", "FluxAttention", "Conv2d", "GroupNorm"}


@pytest.mark.parametrize(
    ("targets", "has_graphs"),
    [
        (("denoiser",), True),
        (("denoiser", "vae"), False),
        (("vae",), False),
        (("encoders",), False),
    ],
)
def test_cuda_graphs_are_for_a_whole_denoiser_alone(targets, has_graphs, caplog):
    """On a CPU there are none; what differs is the mode that torch is given."""
    want = draw(loaded(TABLE["pixa"]))
    pipe = attached("pixa", *targets, mode="reduce-overhead")
    assert difference(draw(pipe), want) <= 1
    assert ("is used without CUDA graphs" in caplog.text) != has_graphs


@pytest.mark.parametrize(("mode", "is_copied"), [("reduce-overhead", True), (None, False)])
def test_result_of_a_cuda_graph_is_copied_since_the_next_call_overwrites_it(mode, is_copied):
    """On a CPU nothing is overwritten: what differs is whether the result is the graph's own."""
    layer, given = torch.nn.Identity(), torch.ones(1)
    settings = CompileSettings(targets=("denoiser",), backend="eager", mode=mode)
    hooks.attach(layer, NAME, _compiled(settings))
    assert (layer(given).data_ptr() != given.data_ptr()) == is_copied
    assert layer(given).item() == 1
