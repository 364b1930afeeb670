"""Timesteps ahead: with stride 2 the segments compute for the evaluation after the present one."""

from typing import Any

import torch
from torch import Tensor

CLOSE = 0.01
"""Relative tolerance. Half precision rounds timesteps by up to 0.4 %."""


class Timesteps:
    """The timesteps that the pipeline will give to the denoiser, read from the scheduler's list.

    first: the first evaluation's timestep as the pipeline gave it. It shows where in the list the
    run starts (image-to-image starts late) and in which unit the pipeline counts (flux divides by
    the number of training steps).
    """

    def __init__(self, scheduler: Any, first: Tensor) -> None:
        self._values = [
            float(value) for value in scheduler.timesteps.tolist()
        ]  # once: the host waits for it
        self._start, self._scale = _find(
            self._values,
            float(first.flatten()[0]),
            scheduler.config.get("num_train_timesteps", 1000),
        )

    def after(self, evaluation: int, current: Tensor) -> Tensor:
        """Return the timestep of the evaluation after this one, with the shape of `current`;
        `current` itself at the end of the list.
        """
        index = self._start + evaluation + 1
        return (
            torch.full_like(current, self._values[index] * self._scale)
            if index < len(self._values)
            else current
        )


def _find(values: list[float], first: float, num_train_timesteps: int) -> tuple[int, float]:
    """Return (index, unit) of the first timestep. The start of the list is tried first, because
    elsewhere a value may fit in both units.
    """
    scales = (1.0, 1.0 / num_train_timesteps)
    for index, value in enumerate(values):
        for scale in scales:
            if abs(value * scale - first) <= CLOSE * abs(first):
                return index, scale
    return 0, 1.0
