"""What the xdit tests run on every rank: a pipeline on the mesh of some degrees, beside plain
diffusers.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from backends.groups.mesh import Mesh
from backends.model_table import read_table
from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from backends.xdit.backend import XDiTBackend
from backends.xdit.plan import make_plan
from tests.checkpoints import inputs

RELATIVE = 1e-5
"""float32: matrix products of other row counts sum in another order, some ten roundings of 6e-8
deep.
"""


@contextmanager
def attached(
    pipe: Any, name: str, rank: int, world_size: int, **options: object
) -> Iterator[XDiTBackend]:
    """`pipe` of model type `name` under an xdit plan with these launch settings; detached and its
    groups closed at the end.
    """
    spec = read_table()[name]
    mesh = Mesh(make_plan(spec, options, world_size), rank=rank, device=torch.device("cpu"))
    backend = XDiTBackend(spec=spec, plan=mesh.plan, mesh=mesh)
    backend.attach(pipe)
    try:
        yield backend
        backend.detach(pipe)  # collective, so not after a failure of one rank
    finally:
        mesh.destroy()


@torch.no_grad()
def latents_of(
    pipe: Any, name: str, *, size: int = 64, steps: int = 3, **arguments: object
) -> Tensor:
    """The latents of a short generation, straight from the pipeline. Arguments have the names that
    most pipelines use.
    """
    own = {"guidance_scale": read_table()[name].guidance_argument}
    if "num_images_per_prompt" not in inspect.signature(pipe.__call__).parameters:
        own["num_images_per_prompt"] = "num_videos_per_prompt"
    renamed = {own.get(key, key): value for key, value in arguments.items()}
    output = pipe(
        **{**inputs(name, size=size, num_inference_steps=steps), "output_type": "latent", **renamed}
    )
    return output[0]


def generated(
    backend: XDiTBackend,
    pipe: Any,
    name: str,
    *,
    size: int = 64,
    steps: int = 3,
    warmup_steps: int | None = None,
    **arguments: object,
) -> Tensor:
    """latents_of between `begin` and `end`, with the step clock ticking after each scheduler step,
    as a host does it.
    """
    scheduler = pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)  # pipelines look for arguments such as `generator` in its signature
    def ticking(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        backend.step_done()
        return output

    guidance = (
        {"guidance_scale": arguments["guidance_scale"]} if "guidance_scale" in arguments else {}
    )
    backend.begin(run_of(size=size, steps=steps, warmup_steps=warmup_steps, **guidance))
    scheduler.step = ticking
    try:
        return latents_of(pipe, name, size=size, steps=steps, **arguments)
    finally:
        del scheduler.step
        backend.end()


def run_of(*, size: int = 64, steps: int = 3, **fields: Any) -> RunInfo:
    return RunInfo(
        request=GenerateRequest(prompt="a cat", **fields),
        height=size,
        width=size,
        num_inference_steps=steps,
    )


def assert_close(
    got: Tensor, want: Tensor, what: object = "", *, relative: float = RELATIVE
) -> None:
    """Equal to `relative` of the largest absolute value of `want`."""
    error = float((got - want).abs().max() / want.abs().max())
    assert error < relative, f"{what}: relative error {error:.2e}, allowed {relative:.0e}"
