"""The CFG split: two ranks draw what one draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from backends import hooks
from backends.base import Backend
from backends.distributed import Mesh
from backends.guidance import NAME
from backends.model_table import read_table
from backends.pipeline import load_pipeline
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, LoadRequest
from backends.single.backend import SingleBackend
from tests.checkpoints import checkpoint

TABLE = read_table()


def check_cfg_split(rank: int, world_size: int, name: str) -> None:
    spec = TABLE[name]
    load = LoadRequest(model_type=name, checkpoint=str(checkpoint(name)), variant="fp32", height=64, width=64)
    pipeline = load_pipeline(spec, load, device=torch.device("cpu"))
    requests = [
        GenerateRequest(prompt="a photo of a cat", negative_prompt="a dog", seed=3, num_inference_steps=3),
        GenerateRequest(prompt="a photo of a cat", seed=3, num_inference_steps=3, guidance_scale=1.0),  # a batch of one: not split
        GenerateRequest(prompt="a red car", seed=4, num_inference_steps=2, height=80, width=96),
    ]
    want = [pipeline.generate(request) for request in requests]
    plan = ParallelPlan(method="single", axes=(("cfg", 2),))
    backend: Backend = SingleBackend(spec=spec, plan=plan, mesh=Mesh(plan, rank=rank, device=torch.device("cpu")))
    pipeline.attach(backend)
    rows: list[int] = []
    denoiser = getattr(pipeline.pipe, spec.denoiser)
    inner = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    got = [pipeline.generate(request) for request in requests]
    inner.remove()
    for one, two in zip(want, got, strict=True):
        scale = np.abs(one.latents).max()
        np.testing.assert_allclose(two.latents, one.latents, rtol=0, atol=1e-5 * max(scale, 1))  # batch 1 and 2 may sum in another order
    assert got[0].report["messages"] == got[0].num_steps
    assert got[1].report["messages"] == 0
    pipeline.detach()
    assert NAME not in hooks.attached(denoiser)
    assert "forward" not in denoiser.__dict__


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "pixa"])
def test_two_rank_cfg_split_equals_one_rank(run_on_ranks: Callable[..., None], name: str) -> None:
    run_on_ranks(check_cfg_split, 2, name)
