"""LoRA files of every format, written from the formats' definitions, and what each adds to a
weight.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backends.generation.pipeline import LoadedPipeline
from tests.backends.features import request_for, result

Keys = dict[str, Tensor]
SMALL = {"height": 64, "width": 64}
SAME = 2e-4
VISIBLE = 20 * SAME
"""Shares of the largest latent. A pixel of 255 changes by less than one within SAME."""


def generate(pipe: LoadedPipeline, **fields: object) -> Tensor:
    """The latents, finer than the image of 8 bits that they become."""
    return result(pipe, request_for(pipe.spec, **{**SMALL, **fields}))


def difference(one: Tensor, other: Tensor) -> float:
    """As a share of the largest value, but 0 where pixels of 255 differ by one at most."""
    largest = float((one - other).abs().max())
    return 0.0 if _is_pixels(one) and largest < 1.01 / 255 else largest / float(other.abs().max())


def _is_pixels(frames: Tensor) -> bool:
    return frames.shape[-1] == 3


def write(path: Path, keys: Mapping[str, Tensor], header: dict[str, str] | None = None) -> str:
    save_file({key: tensor.contiguous() for key, tensor in keys.items()}, path, metadata=header)
    return str(path)


def layer_of(pipe: LoadedPipeline, name: str) -> nn.Module:
    """component.layer, whether or not peft has wrapped it."""
    component, _, layer = name.partition(".")
    module = getattr(pipe.pipe, component).get_submodule(layer)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@contextmanager
def merged(pipe: LoadedPipeline, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Meanwhile the weights (component.layer) or parameters (component.layer:name) have these
    values added.
    """
    kept = {}
    for name, change in changes.items():
        layer, _, attribute = name.partition(":")
        parameter = getattr(layer_of(pipe, layer), attribute or "weight")
        kept[parameter] = parameter.data.clone()
        parameter.data += change.view_as(parameter)
    pipe.forget_prompts()  # they were encoded with the weights before
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data.copy_(data)  # in its own memory, whose alignment decides the last bit
        pipe.forget_prompts()


def factors(seed: int, out: int, num_in: int, rank: int) -> tuple[Tensor, Tensor]:
    """down (rank, in) and up (out, rank), whose product is about as large as a weight."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, num_in, generator=generator) / num_in**0.5
    return down, torch.randn(out, rank, generator=generator) / rank**0.5


def require_same(
    pipe: LoadedPipeline, path: str, changes: Mapping[str, Tensor], *, scale: float = 1.0
) -> None:
    """The file draws what the merged weights draw, and nothing of it is left afterwards."""
    plain = generate(pipe, lora={})
    with merged(pipe, {name: scale * change for name, change in changes.items()}):
        want = generate(pipe, lora={})
    assert difference(want, plain) > (0 if _is_pixels(want) else VISIBLE)
    assert difference(generate(pipe, lora={path: scale}), want) <= SAME
    # the last bit of a sum depends on where in memory an activation lies
    assert difference(generate(pipe, lora={}), plain) <= SAME / 10
