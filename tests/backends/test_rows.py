"""What the rows of the model table say about their pipeline classes is true."""

import inspect
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from backends import planner
from backends.errors import RequestError
from backends.files.generic import carrier, facts_of, why_not
from backends.files.pipeline_calls import pipeline_call
from backends.generation.generic_run import audio_of, frames_of
from backends.generation.schedulers import SCHEDULERS, SampledModel
from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.request import Audio
from tests.backends.features import CPU, attached, loaded, request_for
from tests.checkpoints import NAMES, checkpoint, load

TABLE = read_table()
AS_IS = [name for name, spec in TABLE.items() if spec.takes]


def test_the_fields_that_a_row_lists_are_those_that_its_class_takes():
    for name in AS_IS:
        spec = TABLE[name]
        call = pipeline_call(spec.pipeline)
        assert not why_not(call), name
        makes, takes = facts_of(call)
        assert (spec.output, sorted(spec.takes)) == (makes, sorted(takes)), name
        assert not spec.returns_latents, name
        assert set(call.required) <= {carrier(call.names, field) for field in spec.requires}, name


def plain_output(name: str) -> tuple[np.ndarray, Audio | None]:
    """uint8 (N, H, W, 3), and sound, that diffusers makes of request_for(name)."""
    spec, asked, pipe = TABLE[name], request_for(TABLE[name]), load(name)
    names = inspect.signature(pipe.__call__).parameters
    fields = {field: getattr(asked, field) for field in asked.model_fields_set - {"seed"}}
    fields |= {"guidance_scale": spec.guidance_scale, "fps": spec.frames_per_s}
    arguments = {
        spec.guidance_argument if field == "guidance_scale" else carrier(names, field): value
        for field, value in fields.items()
        if field in (spec.takes or names) and field != "arguments"
    }
    if "max_area" in names:
        arguments["max_area"] = asked.height * asked.width
    arguments |= {**spec.call, **(asked.arguments or {})}
    if spec.empty_negative and spec.guidance_scale > 1:
        arguments["negative_prompt"] = spec.empty_negative
    arguments |= {"generator": torch.Generator().manual_seed(asked.seed), "output_type": "np"}
    arguments = {key: value for key, value in arguments.items() if key in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        output = pipe(**arguments)
    return frames_of(output, spec.output), audio_of(output, pipe)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "flux_fill" else pytest.param(name, marks=pytest.mark.slow)
        for name in TABLE
        if name not in NAMES
    ],
)
def test_one_rank_equals_diffusers(name):
    spec = TABLE[name]
    made = loaded(spec).generate(request_for(spec))
    want, sound = plain_output(name)
    assert want.std() > 1
    assert np.array_equal(made.frames, want)
    assert (made.audio is None) == (sound is None)
    if sound is not None:
        assert sound.samples.std() > 1e-3
        assert np.array_equal(made.audio.samples, sound.samples)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AS_IS if TABLE[name].flow_matching])
def test_samplers_that_a_row_refuses_are_those_that_its_class_cannot_use(name):
    pipe = loaded(TABLE[name])
    own = dict(pipe.pipe.scheduler.config) | {"_class_name": type(pipe.pipe.scheduler).__name__}
    spec = replace(TABLE[name], sampler=own)
    model = SampledModel.by(spec)
    for sampler, facts in SCHEDULERS.items():
        if facts.flow and not model.why_not(sampler):
            made = pipe.generate(request_for(spec).model_copy(update={"scheduler": sampler}))
            assert made.frames.std() > 1, sampler
        elif re.search(r"to the sampler|has no", model.why_not(sampler)):
            with pytest.raises(RequestError, match=r"sigmas|mu|has no attribute"):
                pipe.generate(request_for(spec).model_copy(update={"scheduler": sampler}))


METHODS = (
    ("xdit", {"use_cfg_parallel": True}),
    ("xdit", {"ring_degree": 2}),
    ("asyncdiff", {"use_cfg_parallel": True}),
    ("asyncdiff", {"use_cfg_parallel": False, "model_n": 2, "shard_weights": True}),
)
"""Beside those with which the features of all types are tested."""
SQUARE = {"height": 64, "width": 64}


def check_methods(rank, world_size, name):
    spec = TABLE[name]
    pipe = loaded(spec)
    guided = [request_for(spec, negative_prompt="a dog", **size) for size in ({}, SQUARE)]
    asked = [*guided, request_for(spec, scheduler="lcm", guidance_scale=0.0)]
    wanted = [pipe.generate(each).frames for each in asked]
    assert wanted[0].shape != wanted[1].shape
    for method, options in METHODS:
        given = {**options, "checkpoint": str(checkpoint(name))}
        mesh = Mesh(planner(method)(spec, given, world_size), rank=rank, device=CPU)
        with attached(pipe, mesh) as backend:
            for each, want in zip(asked, wanted, strict=True):
                made = pipe.generate(each).frames.astype(int)
                assert np.abs(made - want).max() <= 1, (method, options)
                if options.get("use_cfg_parallel") and each in guided:
                    assert backend.report()["guidance"] == ["batch"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hidream"])
def test_two_ranks_equal_one_by_all_methods(run_on_ranks, name):
    """HiDream has the halves of guidance in the second dim of one input, a mask over the tokens of
    images that are not square, and distilled checkpoints whose sampler adds noise.
    """
    checkpoint(name)
    run_on_ranks(check_methods, 2, name)
