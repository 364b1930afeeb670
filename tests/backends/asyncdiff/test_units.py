"""Units and segments of the real denoisers of all model types."""

import inspect

import diffusers
import pytest
import torch

from backends.asyncdiff.cut import as_tensors, from_tensors
from backends.asyncdiff.segments import choose_segments
from backends.asyncdiff.trace import time_units, trace
from backends.asyncdiff.units import UnitHooks, find_units
from backends.parallel.hooks import attached
from tests.backends.asyncdiff.runs import loaded, request
from tests.checkpoints import NAMES


class Recorded(Exception):
    """Ends a generation once the denoiser's arguments are known."""


def denoiser_call(name):
    """The denoiser of this type, how the backend calls it, the arguments its pipeline gives it, and
    the name of its input.
    """
    pipe = loaded(name)
    denoiser = getattr(pipe.pipe, pipe.spec.denoiser)
    names = [
        parameter
        for parameter in inspect.signature(type(denoiser).forward).parameters
        if parameter != "self"
    ]
    seen = {}

    def record(*args, **kwargs):
        seen.update(dict(zip(names, args, strict=False)) | kwargs)
        raise Recorded

    denoiser.forward = record
    with pytest.raises(Recorded):
        pipe.generate(request(name))
    del denoiser.forward
    if isinstance(seen[names[0]], list):
        return denoiser, from_tensors(denoiser, names), as_tensors(seen, names), names[0]
    return denoiser, denoiser, seen, names[0]


LATE = ("sd1", "sd2", "sdup", "pixs", "qwenimage", "flux2")  # built of the same parts as others


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in LATE else name for name in NAMES],
    scope="module",
)
def traced(request):
    """One call of each type's denoiser, followed; its hooks stay until the last test on it takes
    them off.
    """
    denoiser, call, arguments, input_name = denoiser_call(request.param)
    hooks = UnitHooks(denoiser)
    with torch.no_grad():
        layout, output = trace(hooks, lambda: call(**arguments), arguments[input_name])
    yield denoiser, lambda: call(**arguments), hooks, layout, output
    if hooks.modules:
        hooks.detach()
    assert not [name for name, module in denoiser.named_modules() if attached(module)]


def test_units_hold_every_weight_that_works_on_the_image(traced):
    denoiser, _, hooks, layout, _ = traced
    in_units = [
        id(parameter)
        for unit in layout.units
        for parameter in hooks.modules[unit.name].parameters()
    ]
    assert len(in_units) == len(set(in_units)), "a weight is in two units"
    outside = [
        name
        for name, parameter in denoiser.named_parameters()
        if id(parameter) not in set(in_units)
    ]
    conditions = (
        "time",
        "add_embedding",
        "class_embedding",
        "context_embedder",
        "text_emb",
        "adaln_single",
        "caption_projection",
        "scale_shift_table",
        "txt_norm",
        "txt_in",
        "modulation",
        "cap_embedder",
        "context_refiner",
        "t_embedder",
        "condition_embedder",
    )
    by_size = (
        "all_x_embedder",
        "all_final_layer",
        "pad_token",
    )  # Z-Image holds them by patch size: small, and computed on every rank
    assert all(any(word in name for word in (*conditions, *by_size)) for name in outside), outside


def test_segments_cover_every_unit_once(traced):
    *_, layout, _ = traced
    for num_segments in (2, 3, 4, len(layout.units)):
        segments = choose_segments(layout, [1.0] * len(layout.units), num_segments)
        covered = [unit for segment in range(num_segments) for unit in segments.units(segment)]
        assert covered == list(range(len(layout.units)))
        assert all(len(segments.units(segment)) > 0 for segment in range(num_segments))


def test_a_unit_reads_only_units_before_it_and_all_are_read(traced):
    *_, layout, _ = traced
    for index, unit in enumerate(layout.units):
        assert all(source[0] < index for source in unit.reads), unit.name
        is_first = not any(
            earlier.reads for earlier in layout.units[:index]
        )  # some read nothing but the input
        assert is_first or unit.reads, f"{unit.name} reads nothing, though it follows others"
    read = {source[0] for unit in layout.units for source in unit.reads} | {
        source[0] for source in layout.output_reads
    }
    assert read == set(range(len(layout.units)))


def test_tracing_leaves_the_result_as_it_was(traced):
    _, call, hooks, _, output = traced
    hooks.detach()
    with torch.no_grad():
        plain = call()
    assert torch.equal(plain[0], output[0])


def test_timing_gives_each_unit_a_positive_time():
    denoiser, _, arguments, input_name = denoiser_call("pixa")
    hooks = UnitHooks(denoiser)
    with torch.no_grad():
        layout, _ = trace(hooks, lambda: denoiser(**arguments), arguments[input_name])
        seconds = time_units(hooks, lambda: denoiser(**arguments), layout, torch.device("cpu"))
    hooks.detach()
    assert len(seconds) == len(layout.units) and all(0 < second < 60 for second in seconds)


def test_units_of_a_unet_are_resnets_samplers_and_transformer_blocks():
    names = set(find_units(loaded("sdxl").pipe.unet))
    for name in (
        "conv_in",
        "down_blocks.1.resnets.0",
        "down_blocks.1.downsamplers.0",
        "mid_block.attentions.0.transformer_blocks.1",
        "conv_out",
    ):
        assert name in names
    assert (
        "mid_block.attentions.0" not in names
        and "mid_block.attentions.0.transformer_blocks.1.ff" not in names
    )


def test_a_block_with_experts_is_one_unit():
    """Of which experts run, and on how many tokens, another step decides otherwise."""
    denoiser = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        llama_layers=(0, 1),
    )
    names = set(find_units(denoiser))
    assert {"double_stream_blocks.0", "single_stream_blocks.0"} <= names
    assert not [name for name in names if "expert" in name]


def test_replaced_modules_are_noticed():
    unet = loaded("sdxl").pipe.unet
    hooks = UnitHooks(unet)
    assert hooks.is_current()
    original = unet.conv_in
    unet.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
    assert not hooks.is_current()
    unet.conv_in = original
    hooks.detach()
