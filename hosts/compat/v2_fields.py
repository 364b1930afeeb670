"""Differences of a v2 POST /generate from a v1 one."""

from collections.abc import Mapping
from typing import Any

from backends.errors import RequestError
from backends.request import whole_number

NO_END = 2**31
"""The clients send 2**32 - 1 for "no last step"."""


COUNTED = {"first_step": "denoising_start", "stop_step": "denoising_end"}
"""Field of v1 -> v2's name of the step."""


def v1_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a v2 /generate in v1's names.

    v2 counts steps instead of giving fractions, and its latents are in the model's own latent
    space.
    """
    fields = {
        name: value
        for name, value in body.items()
        if name not in ("denoise", "denoising_start", "denoising_end")
    }
    first, stop = (_step(body, name) for name in COUNTED.values())
    if first:
        fields["first_step"] = first
    if stop is not None and stop < NO_END:
        fields["stop_step"] = stop
    return {"use_compel": False, **fields, "latent_space": "model"}


def _step(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    number = whole_number(value)
    if number is None or number < 0:
        raise RequestError(
            f"{name}={value!r} is not allowed. Send the number of a step, from 0.", field=name
        )
    return number
