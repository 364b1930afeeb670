"""Several requests as rows of one batch: each gets what it gets alone, and what cannot be a row is
left out.
"""

import inspect
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image

from backends.errors import UnsupportedError
from backends.generation.batching import batch_key, why_alone
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.generation.schedulers import SCHEDULERS, build_scheduler, parse_scheduler
from backends.model_table import read_table
from backends.quantization_spec import QuantizationSpec
from backends.request import CompileSettings, GenerateRequest, LoadRequest
from backends.step_cache_spec import StepCacheSpec
from tests.checkpoints import checkpoint

TABLE = read_table()
SIDE = 64
OTHERS = [name for name, spec in TABLE.items() if spec.is_batchable and name != "sdxl"]
PROMPTS = ("a cat", "a photo of a red car in front of a small house by the sea", "snow")
_LOADED: dict[str, LoadedPipeline] = {}


def load_request(name: str, **more: object) -> LoadRequest:
    return LoadRequest(
        model_type=name,
        checkpoint=str(checkpoint(name)),
        variant="fp32",
        height=SIDE,
        width=SIDE,
        **more,
    )


def loaded(name: str) -> LoadedPipeline:
    if name not in _LOADED:
        _LOADED[name] = load_pipeline(TABLE[name], load_request(name), device=torch.device("cpu"))
    return _LOADED[name]


def requests_of(**shared: object) -> list[GenerateRequest]:
    negatives = ("blurry", "a drawing of many things that nobody wants to see here", "red")
    own = [
        {"prompt": prompt, "negative_prompt": negative}
        for prompt, negative in zip(PROMPTS, negatives, strict=True)
    ]
    return [
        GenerateRequest(seed=seed, **{"num_inference_steps": 3, **fields, **shared})
        for seed, fields in enumerate(own)
    ]


def assert_rows_equal_each_alone(name: str, requests: list[GenerateRequest]) -> None:
    """Sums run in another order: 1e-5 of the largest latent, and so one level of an image at
    most.
    """
    pipeline = loaded(name)
    together = pipeline.generate_together(requests)
    alone = [pipeline.generate(request) for request in requests]
    for got, want in zip(together, alone, strict=True):
        assert np.abs(got.latents - want.latents).max() <= 1e-5 * np.abs(want.latents).max()
        assert (
            got.frames.shape == want.frames.shape
            and np.abs(got.frames.astype(int) - want.frames).max() <= 1
        )
        assert (got.seed, got.resolved, got.num_steps) == (want.seed, want.resolved, want.num_steps)
        assert (got.exactness, want.exactness) == ("reordered", "exact")
    for one, other in zip(alone, alone[1:], strict=False):
        assert np.abs(one.latents - other.latents).max() > 0.1 * np.abs(one.latents).max(), (
            "the rows must differ for this to mean something"
        )


CASES = {
    "as it comes": {},
    "guidance off": {"guidance_scale": 1.0},
    "no negative prompt": {"negative_prompt": None},
    "ends early": {"stop_step": 2},
    "other size": {"height": 48, "width": 80},
    "own noise in each step": {"scheduler": "euler_a"},
    "own noise in each step of a flow": {"scheduler": "fm_lcm"},
}


BRIEF = ("as it comes", "other size", "own noise in each step of a flow")


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("sdxl", CASES),
        ("flux", BRIEF),
        *(pytest.param(name, CASES, marks=pytest.mark.slow) for name in OTHERS),
    ],
)
def test_row_of_a_batch_equals_the_image_alone(name: str, cases: Iterable[str]) -> None:
    for fields in (CASES[label] for label in cases):
        if (
            "scheduler" not in fields
            or fields["scheduler"].startswith("fm") is TABLE[name].flow_matching
        ):
            assert_rows_equal_each_alone(name, requests_of(**fields))


def test_seed_alone_makes_another_row_and_a_batch_leaves_nothing_behind() -> None:
    requests = [
        GenerateRequest(prompt="a cat", seed=seed, num_inference_steps=2) for seed in (5, 6)
    ]
    before = loaded("sdxl").generate(requests[0]).frames
    rows = loaded("sdxl").generate_together(requests)
    assert not np.array_equal(rows[0].frames, rows[1].frames)
    assert np.array_equal(loaded("sdxl").generate(requests[0]).frames, before)


def test_preview_is_of_the_row_that_is_asked_for() -> None:
    pipeline, requests, seen = loaded("sdxl"), requests_of(), {}
    pipeline.generate_together(
        requests,
        on_step=lambda step, num_steps, latents: seen.update(
            {row: pipeline.preview(latents, row) for row in range(3)}
        ),
    )
    for row, request in enumerate(requests):
        alone = []
        pipeline.generate(
            request,
            on_step=lambda step, num_steps, latents, found=alone: found.append(
                pipeline.preview(latents)
            ),
        )
        assert np.abs(seen[row].astype(int) - alone[-1]).max() <= 1


@pytest.mark.parametrize(
    "name", [name for name, facts in SCHEDULERS.items() if not facts.draws_for_all]
)
def test_scheduler_treats_each_row_as_if_it_were_alone(name: str) -> None:
    """Steps of the class itself: the denoiser's answer is made up, the noise is each row's own."""
    facts = SCHEDULERS[name]
    pristine = loaded("sd3" if facts.flow else "sdxl")._pristine_scheduler
    together, *alone = [
        denoised(build_scheduler(parse_scheduler(name), pristine, flow=facts.flow), rows)
        for rows in ((0, 1), (0,), (1,))
    ]
    for row, want in enumerate(alone):
        assert torch.equal(together[row], want[0])
    assert not torch.equal(together[0], together[1])


def denoised(scheduler: object, rows: tuple[int, ...]) -> torch.Tensor:
    """(rows, 4, 4, 4) after six steps."""
    scheduler.set_timesteps(6)
    generators = [torch.Generator().manual_seed(row) for row in rows]
    sample = torch.cat([torch.randn(1, 4, 4, 4, generator=generator) for generator in generators])
    answers = [
        torch.stack(
            [
                torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(99 + row))
                for row in rows
            ]
        )
    ] * 20
    takes = "generator" in inspect.signature(scheduler.step).parameters
    for timestep, answer in zip(scheduler.timesteps, answers, strict=False):
        more = {"generator": generators if len(rows) > 1 else generators[0]} if takes else {}
        sample = scheduler.step(
            answer * 0.1 * sample.std((1, 2, 3), keepdim=True), timestep, sample, **more
        )[0]
    return sample


def test_only_texts_and_seed_may_differ() -> None:
    load = load_request("sdxl")
    base = GenerateRequest(prompt="a cat", seed=1, num_inference_steps=4, height=64, width=64)
    key = batch_key(base, load)
    assert key is not None and key == batch_key(
        base.model_copy(update={"prompt": "a dog", "seed": 2}), load
    )
    other = {
        "num_inference_steps": 5,
        "height": 72,
        "width": 72,
        "guidance_scale": 2.0,
        "clip_skip": 1,
        "scheduler": "euler",
    }
    other |= {
        "lora": {"a": 1.0},
        "sigmas": [1.0, 0.0],
        "denoising_end": 0.5,
        "negative_prompt": "blurry",
        "latent_space": "model",
    }
    assert (
        len(
            {
                key,
                *(
                    batch_key(base.model_copy(update={name: value}), load)
                    for name, value in other.items()
                ),
            }
        )
        == len(other) + 1
    )


ALONE = {
    "latents": np.zeros((1, 4, 8, 8), np.float32),
    "init_image": Image.new("RGB", (8, 8)),
    "control_image": [Image.new("RGB", (8, 8))],
    "prompt_embeds": np.zeros((1, 77, 32), np.float32),
    "quality": "exact",
    "prompt": None,
    "scheduler": "dpm_sde",
}


@pytest.mark.parametrize("field", [*ALONE])
def test_goes_alone(field: str) -> None:
    request = GenerateRequest(prompt="a cat", seed=1).model_copy(update={field: ALONE[field]})
    assert batch_key(request, load_request("sdxl")) is None


@pytest.mark.parametrize(
    "scheduler", [{"scheduler": "fm_euler", "stochastic_sampling": True}, "no_such_scheduler"]
)
def test_request_whose_scheduler_draws_for_the_batch_or_will_be_refused_goes_alone(
    scheduler: object,
) -> None:
    assert (
        batch_key(
            GenerateRequest(prompt="a cat", seed=1, scheduler=scheduler), load_request("flux")
        )
        is None
    )
    assert (
        batch_key(
            GenerateRequest(prompt="a cat", seed=1),
            load_request("flux", scheduler={"scheduler": "dpm_sde"}),
        )
        is None
    )


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("zimage", {}, "a row of a batch of Z-Image depends on the others"),
        (
            "sdxl",
            {"step_cache": StepCacheSpec(kind="deep", value=2)},
            "--step_cache decides once for a whole",
        ),
        ("sdxl", {"compel": True}, "--compel weights one prompt at a time"),
        ("sdxl", {"control_net": {"x": 1.0}}, "needs an image with each job"),
        ("sdxl", {"compile": CompileSettings(targets=("denoiser",))}, "would be recompiled"),
        (
            "sdxl",
            {"quantize": {"denoiser": QuantizationSpec(kind="bnb_int8")}},
            "int8 looks for outliers across the whole batch",
        ),
        (
            "sdxl",
            {
                "quantize": {"denoiser": QuantizationSpec(kind="int8")},
                "lora": {"x": 1.0},
                "offload": "model",
            },
            "",
        ),
    ],
)
def test_pipeline_makes_one_image_at_a_time_where_rows_would_depend_on_each_other(
    name: str, fields: dict, reason: str
) -> None:
    found = why_alone(
        TABLE[name], LoadRequest(model_type=name, checkpoint="", variant="fp32", **fields)
    )
    assert reason in found and bool(reason) is bool(found)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([{}, {"height": 72}], "they differ in more than prompts and seed"),
        ([{"quality": "exact"}] * 2, "one of them must run alone"),
        ([{"scheduler": {"stochastic_sampling": True}}] * 2, "one of them must run alone"),
    ],
)
def test_requests_that_do_not_fit_together_are_refused(fields: list[dict], reason: str) -> None:
    requests = [
        GenerateRequest(prompt="a cat", seed=1, num_inference_steps=2, **each) for each in fields
    ]
    with pytest.raises(
        UnsupportedError,
        match=f"these 2 requests cannot be rows of one batch: {reason}.*Generate them one by one",
    ):
        loaded("sdxl").generate_together(requests)


def test_checkpoint_whose_own_scheduler_draws_for_the_batch_makes_its_images_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = loaded("flux")
    pristine = build_scheduler(
        parse_scheduler({"stochastic_sampling": True}), pipeline._pristine_scheduler, flow=True
    )
    monkeypatch.setattr(pipeline, "_pristine_scheduler", pristine)
    with pytest.raises(
        UnsupportedError, match="FlowMatchEulerDiscreteScheduler draws noise for the whole batch"
    ):
        pipeline.generate_together(requests_of())
