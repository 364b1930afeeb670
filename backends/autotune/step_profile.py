"""Measures one step of a loaded denoiser on one rank.

The result is the Work from which backends/autotune/cost.py predicts.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backends.autotune.cost import Work
from backends.parallel import hooks

NAME = "survey"
WORKSPACE = 6
"""Activations alive at the same time in one block, as a multiple of the largest tensor. Used if the
device does not count memory itself.
"""


class Survey(TorchFunctionMode):
    """Counts during one step what the parallel methods would have to send."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_bytes = self.halo_bytes = self.skip_bytes = self.hidden_bytes = (
            self.largest_bytes
        ) = self.latent_bytes = 0
        self.num_attentions = self.num_convolutions = self.num_norms = 0
        self.seconds = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attention(
                *args[:3],
                **{name: kwargs[name] for name in ("query", "key", "value") if name in kwargs},
            )
        elif func is torch.conv2d:
            self._convolution(
                kwargs.get("input", args[0] if args else None),
                kwargs.get("weight", args[1] if len(args) > 1 else None),
            )
        elif func is F.group_norm:
            self.num_norms += 1
        elif func is torch.cat:
            self._join(
                args[0] if args else kwargs["tensors"],
                kwargs.get("dim", args[1] if len(args) > 1 else 0),
            )
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.largest_bytes = max(self.largest_bytes, query.nbytes)
        # Otherwise it is cross-attention to text, which every rank has in full.
        if query.shape[-2] == key.shape[-2]:
            self.num_attentions += 1
            self.kv_bytes += key.nbytes + value.nbytes
            self.hidden_bytes = max(self.hidden_bytes, query.nbytes)

    def _convolution(self, image: Tensor, weight: Tensor) -> None:
        self.largest_bytes = max(self.largest_bytes, image.nbytes)
        if weight.shape[-2] > 1:
            self.num_convolutions += 1
            self.halo_bytes += 2 * (weight.shape[-2] // 2) * image.nbytes // image.shape[-2]

    def _join(self, tensors: Any, dim: int) -> None:
        """Count skip connections, which a UNet concatenates along the channels."""
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            self.skip_bytes += tensors[1].nbytes

    def work(
        self,
        *,
        step_s: float,
        halves: int,
        weight_bytes: int,
        other_bytes: int,
        activation_bytes: int | None,
    ) -> Work:
        """Return the Work, completed with facts that only the caller knows.

        activation_bytes: as counted by the device, or None.
        """
        if activation_bytes is None:
            activation_bytes = self.skip_bytes + WORKSPACE * self.largest_bytes
        return Work(
            step_s=step_s,
            halves=halves,
            weight_bytes=weight_bytes,
            other_bytes=other_bytes,
            activation_bytes=activation_bytes,
            latent_bytes=self.latent_bytes,
            kv_bytes=self.kv_bytes,
            hidden_bytes=self.hidden_bytes or self.largest_bytes,
            num_attentions=self.num_attentions,
            halo_bytes=self.halo_bytes,
            skip_bytes=self.skip_bytes,
            num_convolutions=self.num_convolutions,
            num_norms=self.num_norms,
        )


@contextmanager
def surveyed(denoiser: nn.Module) -> Iterator[Survey]:
    """Count what `denoiser` does within this context. Leave it after one step."""
    survey = Survey()

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        with survey:
            output = forward(*args, **kwargs)
        survey.seconds += time.perf_counter() - started
        predictions = output[0] if isinstance(output, tuple) else output.sample
        survey.latent_bytes += sum(prediction.nbytes for prediction in predictions)
        return output

    hooks.attach(denoiser, NAME, around)
    try:
        yield survey
    finally:
        hooks.detach(denoiser, NAME)


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())
