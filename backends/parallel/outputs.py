"""What a denoiser returns: a tuple, or any output class of diffusers, with one or more tensors."""

from collections.abc import Sequence
from typing import Any


def output_parts(output: Any) -> list[Any]:
    """Return the values of a denoiser's result, the prediction first."""
    return list(output) if isinstance(output, tuple) else list(output.values())


def rebuilt(output: Any, parts: Sequence[Any]) -> Any:
    """Return a result of the same kind with these values."""
    if isinstance(output, tuple):
        return tuple(parts)
    return type(output)(**dict(zip(output.keys(), parts, strict=True)))
