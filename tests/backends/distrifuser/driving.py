"""Drives a tiny pipeline under the backend, as the generation loop does: begin, a step_done after
each scheduler step, end.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from backends.distrifuser.backend import DistriFuserBackend
from backends.distrifuser.plan import make_plan
from backends.groups.mesh import Mesh
from backends.model_table import ModelTable, read_table
from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from tests.checkpoints import checkpoint, inputs, load, sample_image

PROMPTS = ("a photo of a cat", "two red squares under a tree")
WIDE = 1e-7
"""Allowed relative difference in float64: svd makes 1e-8 of 1e-15 within three steps, mistakes are
above 1e-4.
"""


@cache
def table() -> ModelTable:
    return read_table()


def build(names: Iterable[str]) -> None:
    """Make the checkpoints once, before the ranks ask for them together."""
    for name in names:
        checkpoint(name)


@contextmanager
def attached(
    pipe: Any, name: str, rank: int, world_size: int, **options: object
) -> Iterator[DistriFuserBackend]:
    """The backend attached to `pipe` on this rank."""
    plan = make_plan(table()[name], options, world_size)
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = DistriFuserBackend(spec=table()[name], plan=plan, mesh=mesh)
    try:
        backend.attach(pipe)
        yield backend
        backend.detach(pipe)
    finally:
        mesh.destroy()


def load_wide(name: str) -> Any:
    """The tiny pipeline in float64, where the order of sums is lost in the seventh digit: what
    differs more than that is a mistake.

    In float32 some of these networks of random weights (svd) blow rounding up until nothing can be
    told from it.
    """
    return load(name).to(torch.float64)


def arguments(
    name: str, *, rows: int = 16, columns: int = 8, steps: int = 2, prompts: int = 1, **changes: Any
) -> dict[str, Any]:
    """A short generation whose result is latents (or frames' latents) of `rows` x `columns`; the
    upscaler's are square.
    """
    given = inputs(name, size=8 * rows, num_inference_steps=steps) | {"output_type": "latent"}
    if name == "sdup":
        given["image"] = sample_image(rows)
    else:
        given |= {"height": 8 * rows, "width": 8 * columns}
    if prompts > 1:
        several = {
            "prompt": list(PROMPTS[:prompts]),
            "image": [
                sample_image(rows if name == "sdup" else 8 * rows, seed=s) for s in range(prompts)
            ],
        }
        given |= {key: value for key, value in several.items() if key in given}
    return given | changes


def unguided(name: str) -> dict[str, float]:
    """Arguments that turn classifier-free guidance off."""
    guidance = table()[name].guidance
    return {
        "cfg": {"guidance_scale": 1.0},
        "frame_ramp": {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0},
    }.get(guidance, {})


def generate(
    pipe: Any,
    backend: DistriFuserBackend | None,
    given: dict[str, Any],
    *,
    warmup_steps: int | None = None,
) -> Tensor:
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
        backend.begin(
            RunInfo(
                request=request,
                height=given.get("height", 64),
                width=given.get("width", 64),
                num_inference_steps=steps,
            )
        )
        return _output(pipe(**given))
    finally:
        pipe.scheduler.step = original
        backend.end()


def _output(result: Any) -> Tensor:
    return torch.as_tensor(result.frames if hasattr(result, "frames") else result.images).detach()


def assert_same(got: Tensor, want: Tensor, what: str = "") -> None:
    """Equal but for the order of sums: within a share of the largest value of `want`, WIDE in
    float64 and 1e-5 in float32.
    """
    relative = WIDE if want.dtype == torch.float64 else 1e-5
    limit = relative * max(1.0, float(want.abs().max()))
    difference = float((got - want).abs().max())
    assert torch.isfinite(got).all() and difference <= limit, (
        f"{what} differs by {difference:.2e}, allowed {limit:.2e} (max {want.abs().max():.2f})"
    )
