"""The CFG split: two ranks draw what one draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from backends.generation.pipeline import load_pipeline
from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.parallel import hooks
from backends.parallel.base import Backend
from backends.parallel.cfg_split import NAME
from backends.parallel.cfg_two_calls import PairSplit
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, LoadRequest
from backends.single.backend import SingleBackend
from tests.checkpoints import checkpoint

TABLE = read_table()


def check_cfg_split(rank: int, world_size: int, name: str) -> None:
    spec = TABLE[name]
    load = LoadRequest(
        model_type=name, checkpoint=str(checkpoint(name)), variant="fp32", height=64, width=64
    )
    pipeline = load_pipeline(spec, load, device=torch.device("cpu"))
    requests = [
        GenerateRequest(
            prompt="a photo of a cat", negative_prompt="a dog", seed=3, num_inference_steps=3
        ),
        GenerateRequest(
            prompt="a photo of a cat", seed=3, num_inference_steps=3, guidance_scale=1.0
        ),  # a batch of one: not split
        GenerateRequest(prompt="a red car", seed=4, num_inference_steps=2, height=80, width=96),
    ]
    want = [pipeline.generate(request) for request in requests]
    plan = ParallelPlan(method="single", axes=(("cfg", 2),))
    backend: Backend = SingleBackend(
        spec=spec, plan=plan, mesh=Mesh(plan, rank=rank, device=torch.device("cpu"))
    )
    pipeline.attach(backend)
    rows: list[int] = []
    denoiser = getattr(pipeline.pipe, spec.denoiser)
    inner = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    got = [pipeline.generate(request) for request in requests]
    inner.remove()
    for one, two in zip(want, got, strict=True):
        scale = np.abs(one.latents).max()
        np.testing.assert_allclose(
            two.latents, one.latents, rtol=0, atol=1e-5 * max(scale, 1)
        )  # batch 1 and 2 may sum in another order
    assert got[0].report["messages"] == got[0].num_steps
    assert got[1].report["messages"] == 0
    pipeline.detach()
    assert NAME not in hooks.attached(denoiser)
    assert "forward" not in denoiser.__dict__


@pytest.mark.parametrize(
    "name",
    [
        "sdxl",
        "sd3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd1", "sd2", "pixa")),
    ],
)
def test_two_rank_cfg_split_equals_one_rank(run_on_ranks: Callable[..., None], name: str) -> None:
    run_on_ranks(check_cfg_split, 2, name)


def check_pairs(rank: int, world_size: int, name: str) -> None:
    """The denoiser is called twice a step, and each rank's blocks run once, but in the very first
    step, in which both calls are made to learn their form.
    """
    spec = TABLE[name]
    load = LoadRequest(
        model_type=name, checkpoint=str(checkpoint(name)), variant="fp32", height=64, width=64
    )
    pipeline = load_pipeline(spec, load, device=torch.device("cpu"))
    fields = {
        "prompt": "a photo of a cat",
        "seed": 3,
        "num_inference_steps": 3,
        **({"num_frames": 5} if spec.output == "video" else {}),
    }
    requests = [
        GenerateRequest(**fields, negative_prompt="a dog"),
        GenerateRequest(**fields, guidance_scale=1.0),
        GenerateRequest(**fields),
    ]
    want = [pipeline.generate(request) for request in requests]
    assert (want[0].frames != want[2].frames).any()
    plan = ParallelPlan(method="single", axes=(("cfg", 2),))
    pipeline.attach(
        SingleBackend(spec=spec, plan=plan, mesh=Mesh(plan, rank=rank, device=torch.device("cpu")))
    )
    calls: list[int] = []
    head = next(
        module
        for module in pipeline.pipe.transformer.modules()
        if isinstance(module, torch.nn.ModuleList)
    )[0]
    counter = head.register_forward_pre_hook(lambda *_: calls.append(1))
    for request, one, num_calls in zip(requests, want, (4, 3, 3), strict=True):
        calls.clear()
        two = pipeline.generate(request)
        assert len(calls) == num_calls, "half of the calls with guidance, all of them without"
        assert np.abs(two.frames.astype(int) - one.frames).max() <= 1
        if one.latents is not None:
            np.testing.assert_allclose(
                two.latents, one.latents, rtol=0, atol=1e-5 * np.abs(one.latents).max()
            )
    counter.remove()
    pipeline.detach()
    assert not hooks.attached(pipeline.pipe.transformer)


@pytest.mark.parametrize("name", ["wan_t2v", pytest.param("qwenimage", marks=pytest.mark.slow)])
def test_two_ranks_share_the_two_calls_of_a_step(
    run_on_ranks: Callable[..., None], name: str
) -> None:
    run_on_ranks(check_pairs, 2, name)


def test_a_step_with_one_call_where_two_were_expected_is_an_error() -> None:
    plan = ParallelPlan(method="single", axes=())
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    pairs = PairSplit(layer, Mesh(plan, rank=0, device=torch.device("cpu")))
    layer.forward = lambda hidden_states: (hidden_states,)
    pairs.attach()
    pairs.begin(is_on=True)
    layer(hidden_states=torch.ones(1, 4))
    with pytest.raises(
        RuntimeError,
        match=(
            r"its Sequential once in a step with guidance, but two calls were expected. Run "
            r"it "
            r"without --use"
        ),
    ):
        pairs.step_done()
    pairs.begin(is_on=False)
    layer(hidden_states=torch.ones(1, 4))
    pairs.step_done()
