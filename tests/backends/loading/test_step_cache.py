"""Step caches: how much is left out, that the next image knows nothing of it, and that ranks come
to the same decisions.
"""

import pytest
import torch

from backends import planner
from backends.errors import ConfigError, UnsupportedError
from backends.groups.mesh import Mesh
from backends.loading.caches.step_cache import StepCache, inner_modules
from backends.step_cache_spec import parse_step_cache, require_step_cache
from backends.xdit.plan import make_plan
from tests.backends.features import CPU, TABLE, attached, feature, loaded, request_for, result
from tests.backends.reference import skipped_by_hand
from tests.backends.xdit.transformer_cases import build, call
from tests.checkpoints import checkpoint

STEPS = 6
ON_2 = ({"use_cfg_parallel": True}, {"ulysses_degree": 2}, {"ring_degree": 2})


def cached(name, text, **load):
    return loaded(TABLE[name], step_cache=parse_step_cache(text, TABLE[name]), **load)


def asked(name, **fields):
    return request_for(
        TABLE[name], **{"num_inference_steps": STEPS, "height": 64, "width": 64} | fields
    )


def counted(pipe):
    """Name of each block (of a UNet: each module of the outermost level and inside) -> how often it
    runs.
    """
    denoiser, counts = getattr(pipe.pipe, pipe.spec.denoiser), {}
    lists = pipe.spec.blocks or ("down_blocks", "mid_block", "up_blocks")
    for path, module in denoiser.named_modules():
        if (
            any(path == f"{name}.{index}" for name in lists for index in range(9))
            or path == "mid_block"
        ):
            counts[path] = 0
            inside = next(
                child
                for child in module.modules()
                if isinstance(child, torch.nn.Linear | torch.nn.Conv2d)
            )
            inside.register_forward_pre_hook(
                lambda *_, path=path: counts.update({path: counts[path] + 1})
            )
    return counts


@pytest.mark.parametrize(
    ("name", "text", "full"),
    [("flux", "first_block,10", 1), ("pixa", "taylor,3", 2), ("flux2", "taylor,2", 3)],
)
def test_skipped_steps_run_the_first_block_only(name, text, full):
    pipe = cached(name, text)
    counts = counted(pipe)
    made = pipe.generate(asked(name))
    assert made.report["step_cache"] == {"calls": STEPS, "skipped": STEPS - full}
    first, *others = counts.values()
    assert first == STEPS and set(others) == {full}
    assert made.exactness == "approximate"


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("qwenimage", "QwenImageTransformer2DModel"),  # the text first
        ("hunyuanvideo", "HunyuanVideoTransformer3DModel"),  # the image first
        ("cogvideox", "CogVideoXTransformer3DModel"),
        ("hidream", "HiDreamImageTransformer2DModel"),  # and in its last blocks in one tensor
        ("ltx2", "LTX2VideoTransformer3DModel"),  # with sound, which the result shows
    ],
)
@pytest.mark.parametrize("kind", ["first_block,0.1", "taylor,2"])
def test_step_that_is_skipped_with_the_same_input_gives_the_same(name, case, kind):
    spec, denoiser = TABLE[name], build(case)
    cache = StepCache(parse_step_cache(kind, spec), spec, denoiser)
    cache.attach()
    cache.begin(is_on=True)
    want = call(denoiser, case)
    cache.step_done(2)
    got = call(denoiser, case)
    assert cache.report() == {"calls": 2, "skipped": 1}
    cache.detach()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_skipped_steps_run_the_outermost_level_of_a_unet_only():
    pipe = cached("sd1", "deep,3")
    counts = counted(pipe)
    made = pipe.generate(asked("sd1", scheduler="ddim"))
    assert made.report["step_cache"] == {"calls": STEPS, "skipped": 4}
    outermost = {"down_blocks.0", "up_blocks.3"}
    assert {name: count for name, count in counts.items() if name in outermost} == dict.fromkeys(
        outermost, STEPS
    )
    assert {count for name, count in counts.items() if name not in outermost} == {2}
    assert len(inner_modules(pipe.pipe.unet)) == 7


@pytest.mark.parametrize(
    ("name", "text"), [("sd3", "first_block,0.6"), ("sd3", "taylor,2"), ("sd1", "deep,2")]
)
def test_image_stays_close_and_the_next_one_is_not_changed_by_it(name, text):
    """Bounds as measured, with a margin of two: random weights change much from step to step, so
    this is a hard case.
    """
    plain, pipe = loaded(TABLE[name]), cached(name, text)
    want, other = result(plain, asked(name)), result(plain, asked(name, prompt="a red car", seed=9))
    first = pipe.generate(asked(name))
    skipped = first.report["step_cache"]["skipped"]
    assert 0 < skipped < first.report["step_cache"]["calls"]
    got = torch.from_numpy(first.latents)
    assert (
        0
        < float((got - want).norm() / want.norm())
        < 0.2
        < float((other - want).norm() / want.norm())
    )
    result(pipe, asked(name, prompt="a red car", seed=9, height=80, width=64))
    assert torch.equal(result(pipe, asked(name)), got), "something was left behind"
    assert torch.equal(result(pipe, asked(name, quality="exact")), want)


FAST = ("sd1", "flux", "qwenimage", "zimage")
CACHED = [
    name
    for name, spec in TABLE.items()
    if spec.supports("single", "step_cache").status == "tested" and len(spec.denoisers) == 1
]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CACHED],
)
def test_skipped_predictions_are_on_the_line_through_the_last_two(name):
    """Equal to plain diffusers with a denoiser that is skipped by hand, in every type."""
    plain, pipe = loaded(TABLE[name]), cached(name, "prediction,3")
    # PNDM makes one call more than it has steps, and DDPM adds noise
    others = ("sd1", "sd2", "sdup", "ad", "hy", "pix2pix")
    fields = {"scheduler": "euler"} if name in others else {}
    without = result(plain, asked(name, **fields))
    made = pipe.generate(asked(name, **fields))
    figures = made.report["step_cache"]
    calls = figures["calls"] // STEPS  # one, or one for each half of guidance
    denoiser = getattr(plain.pipe, plain.spec.denoiser)
    with skipped_by_hand(denoiser, every=3, calls=calls, num_steps=STEPS) as ran:
        want = result(plain, asked(name, **fields))
    assert ran == [0, 1, 2, 5]
    assert figures == {"calls": calls * STEPS, "skipped": calls * 2}
    assert made.exactness == "approximate"
    assert float((want - without).abs().max()) > 1e-3
    torch.testing.assert_close(result(pipe, asked(name, **fields)), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(result(pipe, asked(name, quality="exact", **fields)), without)


def test_a_denoiser_that_writes_over_what_it_returned_is_continued_all_the_same():
    """As one does that is captured in a CUDA graph."""
    fields = {"scheduler": "euler"}
    want = result(cached("sd1", "prediction,3"), asked("sd1", **fields))
    pipe = loaded(TABLE["sd1"])
    forward, held = pipe.pipe.unet.forward, []

    def same_buffer(*args, **kwargs):
        output = forward(*args, **kwargs)
        held.append(held[0].copy_(output[0]) if held else output[0].clone())
        return (held[0],)

    pipe.pipe.unet.forward = same_buffer
    pipe._use_step_cache(parse_step_cache("prediction,3", TABLE["sd1"]))
    assert torch.equal(result(pipe, asked("sd1", **fields)), want)


@pytest.mark.parametrize("scheduler", ["euler_a", "heun", "ddpm", "dpmpp_2m_sde", "lcm"])
def test_samplers_that_add_noise_or_go_back_compute_every_step(scheduler):
    made = cached("sd1", "prediction,2").generate(asked("sd1", scheduler=scheduler))
    assert made.report["step_cache"]["skipped"] == 0 and made.exactness == "exact"


UNEVEN = (
    {"scheduler": {"scheduler": "euler", "use_karras_sigmas": True}},
    {"scheduler": "euler", "sigmas": [float(20 - step) for step in range(20)]},
)


@pytest.mark.parametrize("fields", UNEVEN)
@pytest.mark.parametrize("text", ["prediction,2", "deep,2"])
def test_what_a_quality_promises_does_not_hold_for_uneven_steps(text, fields):
    """A cache that the launch names is used for them nevertheless."""
    steps = {"num_inference_steps": 20, "height": 16, "width": 16}
    pipe = cached("sd1", text)
    assert pipe.generate(asked("sd1", **steps, **fields)).report["step_cache"]["skipped"] > 0
    high = asked("sd1", **steps, **fields, quality="high")
    assert pipe.generate(high).report["step_cache"]["skipped"] == 0
    even = asked("sd1", **steps, scheduler="euler", quality="high")
    assert pipe.generate(even).report["step_cache"]["skipped"] > 0


def test_a_controlnet_does_not_run_in_a_skipped_step():
    control = feature("controlnet", TABLE["sd1"])
    pipe, plain = (
        cached("sd1", "prediction,3", **control.load),
        loaded(TABLE["sd1"], **control.load),
    )
    ran = []
    pipe.pipe.controlnet.conv_in.register_forward_pre_hook(lambda *_: ran.append(1))
    got = result(pipe, asked("sd1", scheduler="euler", **control.request))
    assert len(ran) == 4, "of 6 steps 2 are skipped"
    with skipped_by_hand(plain.pipe.unet, every=3, num_steps=STEPS):
        want = result(plain, asked("sd1", scheduler="euler", **control.request))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def check_methods_skip_alike(rank, world_size, name, methods):
    pipe = cached(name, "prediction,3")
    want = pipe.generate(asked(name))
    assert want.report["step_cache"]["skipped"] > 0
    for backend, options in methods:
        plan = planner(backend)(pipe.spec, options, world_size)
        mesh = Mesh(plan, rank=rank, device=CPU)
        with attached(pipe, mesh):
            made = pipe.generate(asked(name))
            assert made.report["step_cache"] == want.report["step_cache"], options
            difference = abs(made.frames.astype(int) - want.frames).max()
            assert difference <= 1, (options, difference)
            alone = made.report["sent_bytes"]
            whole = pipe.generate(asked(name, quality="exact")).report["sent_bytes"]
            assert alone < 0.8 * whole, "a skipped step sent something"
        mesh.destroy()


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("sdxl", [("distrifuser", {}), ("distrifuser", {"sync_mode": "full_sync"})]),
        ("sd3", [("xdit", options) for options in ON_2]),
        pytest.param("wan_t2v", [("xdit", options) for options in ON_2], marks=pytest.mark.slow),
    ],
)
def test_methods_skip_whole_steps_and_send_nothing_in_them(run_on_ranks, name, methods):
    checkpoint(name)
    run_on_ranks(check_methods_skip_alike, 2, name, methods)


def test_threshold_zero_skips_nothing():
    pipe = cached("sd3", "first_block,0")
    made = pipe.generate(asked("sd3"))
    assert made.report["step_cache"]["skipped"] == 0
    assert made.exactness == "exact"
    assert torch.equal(torch.from_numpy(made.latents), result(loaded(TABLE["sd3"]), asked("sd3")))


@pytest.mark.parametrize(
    "name",
    [
        "sd3",
        "flux",
        "hy",
        pytest.param("sd1", marks=pytest.mark.slow),
        pytest.param("zimage", marks=pytest.mark.slow),
    ],
)
def test_same_call_again_gives_the_same_prediction_also_with_a_controlnet(name):
    """The remembered effect holds the ControlNet's residuals already, so that they must not come in
    again.
    """
    spec = TABLE[name]
    control = feature("controlnet", spec)
    text = "deep,2" if spec.denoiser == "unet" else "first_block,10"
    pipe = cached(name, text, **control.load)
    denoiser, predictions = getattr(pipe.pipe, spec.denoiser), []
    forward = denoiser.forward

    def twice(*args, **kwargs):
        """Every call is made again a step later, with the same arguments. Some denoisers empty the
        lists they are given.
        """
        output = forward(
            *args,
            **{
                key: list(value) if isinstance(value, list) else value
                for key, value in kwargs.items()
            },
        )
        pipe._step_cache.step_done(2)
        again = forward(*args, **kwargs)
        pairs = (
            zip(output[0], again[0], strict=True)
            if isinstance(output[0], list)
            else [(output[0], again[0])]
        )
        predictions.extend((one, two) for one, two in pairs)
        return output

    denoiser.forward = twice
    made = pipe.generate(asked(name, num_inference_steps=1, **control.request))
    assert made.report["step_cache"] == {"calls": 2, "skipped": 1}
    for one, two in predictions:
        torch.testing.assert_close(two, one, rtol=0, atol=2e-6 * float(one.abs().max()))


def check_ranks_agree(rank, world_size, name, text, sets):
    """At these thresholds halves of the batch and of the tokens, asked by themselves, would not
    agree.
    """
    pipe = cached(name, text)
    want = pipe.generate(asked(name))
    skipped = want.report["step_cache"]["skipped"]
    assert 0 < skipped < want.report["step_cache"]["calls"] - 1, skipped
    for options in sets:
        mesh = Mesh(make_plan(pipe.spec, options, world_size), rank=rank, device=CPU)
        with attached(pipe, mesh):
            made = pipe.generate(asked(name))
            figures = made.report["step_cache"]
            calls = want.report["step_cache"]["calls"]
            if options.get("use_cfg_parallel") and pipe.spec.guidance_calls == 2:
                # each rank makes one call of a step, and both in the first (cfg_two_calls.py)
                assert figures["calls"] == calls // 2 + 1
            else:
                assert (figures["calls"], figures["skipped"]) == (calls, skipped), options
            difference = abs(made.frames.astype(int) - want.frames).max()
            assert difference <= 1, (options, difference)
        mesh.destroy()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sd3", "first_block,0.33"),
        ("wan_t2v", "first_block,0.3"),
        pytest.param("pixa", "first_block,0.3", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_skip_what_one_skips(run_on_ranks, name, text):
    checkpoint(name)
    run_on_ranks(check_ranks_agree, 2, name, text, ON_2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sdxl", "first_block", r"type 'sdxl' has a unet. Allowed: deep,2 or prediction,2\."),
        (
            "flux",
            "deep,2",
            r"a transformer. Allowed: first_block,0.08 or taylor,3 or prediction,2\.",
        ),
        ("flux", "magic", r"--step_cache=magic is not allowed"),
        (
            "flux",
            "first_block,-1",
            r"After 'first_block,' give a number from 0 to 10, such as first_block,0.08\.",
        ),
        ("flux", "first_block,x", r"After 'first_block,' give a number from 0 to 10"),
        (
            "flux",
            "taylor,1",
            r"After 'taylor,' give a whole number from 2 to 100, such as taylor,3\.",
        ),
        ("sd1", "deep,2.5", r"After 'deep,' give a whole number from 2 to 100"),
    ],
)
def test_rejects_what_does_not_fit_the_type(name, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_step_cache(text, TABLE[name])


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        (
            "xdit",
            {"pipefusion_parallel_degree": 2},
            r"step_cache=first_block,0.08 is not available with PipeFusion: .* Use Ulysses",
        ),
        (
            "distrifuser",
            {},
            r"not available with patches that take values of the step before, .* Use a cache "
            r"that skips by number \(deep, taylor, prediction\)",
        ),
        (
            "asyncdiff",
            {},
            r"not available with segments that read .* Use --step_cache=prediction,2, which",
        ),
    ],
)
def test_rejects_methods_that_take_values_of_the_step_before(backend, options, message):
    plan = planner(backend)(TABLE["flux"], options, 2)
    with pytest.raises(UnsupportedError, match=message):
        require_step_cache(parse_step_cache("first_block", TABLE["flux"]), plan)


@pytest.mark.parametrize("backend", ["distrifuser", "asyncdiff"])
def test_methods_that_take_values_of_the_step_before_allow_skipped_predictions(backend):
    plan = planner(backend)(TABLE["flux"], {}, 2)
    require_step_cache(parse_step_cache("prediction", TABLE["flux"]), plan)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("xdit", {"pipefusion_parallel_degree": 2}, "PipeFusion, whose predictions are still"),
        (
            "asyncdiff",
            {"time_shift": True},
            "--time_shift, which works for the timestep of the next",
        ),
    ],
)
def test_skipped_predictions_are_refused_where_a_step_reaches_into_the_next(
    backend, options, message
):
    plan = planner(backend)(TABLE["flux"], options, 2)
    with pytest.raises(UnsupportedError, match=message):
        require_step_cache(parse_step_cache("prediction", TABLE["flux"]), plan)


def test_allows_patches_that_exchange_in_each_step_and_the_cfg_split():
    cache = parse_step_cache("deep", TABLE["sdxl"])
    make_plan = planner("distrifuser")
    patches = {"sync_mode": "full_sync", "no_split_batch": True}
    require_step_cache(cache, make_plan(TABLE["sdxl"], patches, 2))
    require_step_cache(cache, make_plan(TABLE["sdxl"], {}, 2))
    assert str(cache) == "deep,2"


@pytest.mark.parametrize("mode", ["corrected_async_gn", "no_sync", "rotate"])
def test_displaced_patches_take_caches_that_skip_by_number_unless_the_ranks_take_turns(mode):
    plan = planner("distrifuser")(TABLE["sdxl"], {"sync_mode": mode, "no_split_batch": True}, 2)
    cache = parse_step_cache("deep", TABLE["sdxl"])
    if mode == "rotate":
        with pytest.raises(UnsupportedError, match="another --sync_mode than rotate"):
            require_step_cache(cache, plan)
    else:
        require_step_cache(cache, plan)
