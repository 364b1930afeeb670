"""Real generations with AsyncDiff attached, for the tests of this folder. Every rank calls these
alike.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from backends.asyncdiff.backend import AsyncDiffBackend
from backends.asyncdiff.plan import make_plan
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from backends.step_cache_spec import StepCacheSpec
from tests.checkpoints import checkpoint
from tests.checkpoints.factory import sample_image

SIZE = 64


def prepare(*names: str) -> None:
    """Build the checkpoints before ranks start: transformers saves nothing on ranks above 0."""
    for name in names:
        checkpoint(name)


def loaded(name: str) -> LoadedPipeline:
    """Every rank decodes alone: the patches of a decode by all sum in another order, and these
    tests are of the denoiser.
    """
    load = LoadRequest(
        model_type=name, checkpoint=str(checkpoint(name)), variant="fp32", parallel_vae=False
    )
    return load_pipeline(read_table()[name], load, device=torch.device("cpu"))


def request(name: str, **fields: Any) -> GenerateRequest:
    """A short, small generation of this type."""
    base: dict[str, Any] = {
        "seed": 1,
        "num_inference_steps": 4,
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": 3.0,
    }
    if name != "svd":
        base |= {"prompt": "a photo of a cat", "negative_prompt": "red"}
    if read_table()[name].guidance == "distilled":
        del base["negative_prompt"]
    if name in ("svd", "sdup"):
        base["image"] = sample_image(SIZE // 4 if name == "sdup" else SIZE)
    if name in ("svd", "ad"):
        base["num_frames"] = 4
    if name == "wan_t2v":
        base["num_frames"] = 5
    return GenerateRequest(**(base | fields))


@contextmanager
def attached(
    pipe: LoadedPipeline,
    options: Mapping[str, object],
    *,
    rank: int,
    world_size: int,
    step_cache: StepCacheSpec | None = None,
) -> Iterator[AsyncDiffBackend]:
    """The backend on this pipeline, cut by numbers of parameters so that no clock decides; detached
    afterwards.
    """
    plan = make_plan(pipe.spec, options, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = AsyncDiffBackend(spec=pipe.spec, plan=plan, mesh=mesh)
    backend.costs_of = parameter_counts
    pipe.attach(backend, step_cache)
    try:
        yield backend
        pipe.detach()  # collective with shared weights, so not after a failure of one rank
    finally:
        mesh.destroy()


def parameter_counts(
    hooks: Any, call: Callable[[], Any], layout: Any, device: torch.device
) -> list[float]:
    return [
        1.0 + sum(parameter.numel() for parameter in hooks.modules[unit.name].parameters())
        for unit in layout.units
    ]


def result(pipe: LoadedPipeline, asked: GenerateRequest) -> torch.Tensor:
    """The latents, or for types that give none the frames in 0..1, as float32."""
    made = pipe.generate(asked)
    return (
        torch.from_numpy(made.latents)
        if made.latents is not None
        else torch.from_numpy(made.frames).float() / 255
    )
