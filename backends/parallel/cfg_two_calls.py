"""CFG split for pipelines that call their denoiser once for each half of guidance.

Each rank makes one of a step's two calls. The pipeline combines the halves only after both calls,
so each rank of a pair computes its own call and returns an empty tensor for the other. At the
second call the ranks exchange results and fill that tensor in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backends.groups.collectives import all_gather
from backends.groups.mesh import Mesh
from backends.parallel import hooks

NAME = "cfg pairs"


class PairSplit:
    """Splits the two calls of each step of one denoiser, while guidance is on."""

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._denoiser = denoiser
        self._mesh = mesh
        self._is_on = False
        self._first: Tensor | None = None

    def attach(self) -> None:
        hooks.attach(self._denoiser, NAME, self._around)

    def detach(self) -> None:
        hooks.detach(self._denoiser, NAME)

    def begin(self, *, is_on: bool) -> None:
        self._is_on, self._first = is_on, None

    def step_done(self) -> None:
        """Raise RuntimeError if the step made only one call, since it then used an empty result."""
        if self._first is not None:
            raise RuntimeError(
                f"the pipeline called its {type(self._denoiser).__name__} once in a step with "
                "guidance, but two calls were expected. Run it without --use_cfg_parallel."
            )

    def end(self) -> None:
        self._is_on, self._first = False, None

    def _around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_on:
            return forward(*args, **kwargs)
        sample = args[0] if args else kwargs["hidden_states"]
        axis = self._mesh.axis("cfg")
        call = 0 if self._first is None else 1
        output = forward(*args, **kwargs) if call == axis.rank else (torch.empty_like(sample),)
        if output[0].shape != sample.shape:
            raise RuntimeError(
                f"a prediction of shape {tuple(output[0].shape)} for latents of "
                f"{tuple(sample.shape)} cannot be paired."
            )
        if call == 0:
            self._first = output[0]
        else:
            mine, theirs = (self._first, output[0]) if axis.rank == 0 else (output[0], self._first)
            halves = all_gather(mine, dim=0, axis=axis, traffic=self._mesh.traffic).chunk(2)
            theirs.copy_(halves[1 - axis.rank])
            self._first = None
        return output if isinstance(output, tuple) else (output[0],)
