"""Step caches: how much is left out, that the next image knows nothing of it, and that ranks come
to the same decisions.
"""

import pytest
import torch

from backends import planner
from backends.errors import ConfigError, UnsupportedError
from backends.groups.mesh import Mesh
from backends.loading.step_cache import inner_modules
from backends.step_cache_spec import parse_step_cache, require_step_cache
from backends.xdit.plan import make_plan
from tests.backends.features import CPU, TABLE, attached, feature, loaded, request_for, result
from tests.checkpoints import checkpoint

STEPS = 6


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
        pipe._step_cache.step_done()
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
            share = 0.5 if options.get("use_cfg_parallel") and pipe.spec.guidance_calls == 2 else 1
            assert figures["calls"] == want.report["step_cache"]["calls"] * share
            if share == 1:
                assert figures["skipped"] == skipped, options
            difference = abs(made.frames.astype(int) - want.frames).max()
            assert difference <= 1, (options, difference)
        mesh.destroy()


ON_2 = ({"use_cfg_parallel": True}, {"ulysses_degree": 2}, {"ring_degree": 2})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sd3", "first_block,0.33"),
        *(
            pytest.param(name, "first_block,0.3", marks=pytest.mark.slow)
            for name in ("wan_t2v", "pixa")
        ),
    ],
)
def test_two_ranks_skip_what_one_skips(run_on_ranks, name, text):
    checkpoint(name)
    run_on_ranks(check_ranks_agree, 2, name, text, ON_2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sdxl", "first_block", r"type 'sdxl' has a unet. Allowed: deep,2\."),
        (
            "flux",
            "deep,2",
            r"type 'flux' has a transformer. Allowed: first_block,0.08 or taylor,3\.",
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
            r"not available with patches that take values of the step before, .* Use "
            r"--sync_mode=full_sync",
        ),
        ("asyncdiff", {}, r"not available with segments that read .* Use another backend"),
    ],
)
def test_rejects_methods_that_take_values_of_the_step_before(backend, options, message):
    plan = planner(backend)(TABLE["flux"], options, 2)
    with pytest.raises(UnsupportedError, match=message):
        require_step_cache(parse_step_cache("first_block", TABLE["flux"]), plan)


def test_allows_patches_that_exchange_in_each_step_and_the_cfg_split():
    cache = parse_step_cache("deep", TABLE["sdxl"])
    make_plan = planner("distrifuser")
    patches = {"sync_mode": "full_sync", "no_split_batch": True}
    require_step_cache(cache, make_plan(TABLE["sdxl"], patches, 2))
    require_step_cache(cache, make_plan(TABLE["sdxl"], {}, 2))
    assert str(cache) == "deep,2"
