"""Drives a tiny pipeline under the backend, as the generation loop does: begin, a step_done after each scheduler step, end."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from backends.base import Run
from backends.distributed import Mesh
from backends.distrifuser.backend import DistriFuserBackend
from backends.distrifuser.plan import make_plan
from backends.model_table import ModelTable, read_table
from backends.request import GenerateRequest
from tests.checkpoints import checkpoint, inputs


@cache
def table() -> ModelTable:
    return read_table()


def build(names: Iterable[str]) -> None:
    """Make the checkpoints once, before the ranks ask for them together."""
    for name in names:
        checkpoint(name)


@contextmanager
def attached(pipe: Any, name: str, rank: int, world_size: int, **options: object) -> Iterator[DistriFuserBackend]:
    """The backend attached to `pipe` on this rank."""
    plan = make_plan(table()[name], options, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = DistriFuserBackend(spec=table()[name], plan=plan, mesh=mesh)
    backend.attach(pipe)
    try:
        yield backend
    finally:
        backend.detach(pipe)
        mesh.destroy()


def arguments(name: str, *, height: int = 128, width: int = 64, steps: int = 3, **changes: Any) -> dict[str, Any]:
    """A short generation whose result is latents (or frames' latents)."""
    given = inputs(name, size=max(height, width), num_inference_steps=steps) | {"output_type": "latent"}
    if "height" in given:
        given |= {"height": height, "width": width}
    return given | changes


def generate(pipe: Any, backend: DistriFuserBackend | None, given: dict[str, Any], *, warmup_steps: int | None = None) -> Tensor:
    """The latents of one generation; with no backend, plain diffusers."""
    given = given | {"generator": torch.Generator().manual_seed(0)}
    if backend is None:
        return _output(pipe(**given))
    steps = given["num_inference_steps"]
    request = GenerateRequest(num_inference_steps=steps, warmup_steps=warmup_steps)
    original = pipe.scheduler.step

    @wraps(original)  # the pipelines look at the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        backend.step_done()
        return result

    pipe.scheduler.step = step
    try:
        backend.begin(Run(request=request, height=given.get("height", 64), width=given.get("width", 64), num_inference_steps=steps))
        return _output(pipe(**given))
    finally:
        pipe.scheduler.step = original
        backend.end()


def _output(result: Any) -> Tensor:
    return torch.as_tensor(result.frames if hasattr(result, "frames") else result.images).detach()


def assert_same(got: Tensor, want: Tensor, *, relative: float = 1e-5) -> None:
    """Within `relative` of the largest value of `want`, and at least 1e-5: float32 sums in another order."""
    limit = max(1e-5, relative * float(want.abs().max()))
    difference = float((got - want).abs().max())
    assert torch.isfinite(got).all() and difference <= limit, (
        f"differs by {difference:.2e}, allowed {limit:.2e} (max {want.abs().max():.2f})"
    )
