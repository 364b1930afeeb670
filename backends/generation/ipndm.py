"""The sampler `ipndm`: linear multistep of up to fourth order in sigma."""

import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights per number of known slopes, the newest slope first."""


class IPNDMSigmaScheduler(EulerDiscreteScheduler):
    """Euler's schedule and scaling, with the last slopes combined by Adams-Bashforth weights.

    The first steps use the lower orders, as in "improved PNDM": Zhang & Chen, arXiv:2204.13902,
    section 4.
    """

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        super()._init_step_index(timestep)
        self._slopes: list[torch.Tensor] = []

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Move `sample` to the next noise level. Same shape in and out; computed in float32."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, next_sigma = self.sigmas[self.step_index : self.step_index + 2].tolist()
        slope = self._slope(model_output.float(), sample.float(), sigma)
        self._slopes = [slope, *self._slopes[:3]]
        weights = ADAMS_BASHFORTH[len(self._slopes) - 1]
        combined = sum(weight * slope for weight, slope in zip(weights, self._slopes, strict=True))
        previous = (sample.float() + (next_sigma - sigma) * combined).to(model_output.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _slope(
        self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float
    ) -> torch.Tensor:
        """Return d sample / d sigma, the noise in the sample."""
        match self.config.prediction_type:
            case "epsilon":
                return model_output
            case "v_prediction":
                clean = sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
            case "sample":
                clean = model_output
            case other:
                raise ValueError(
                    f"prediction_type={other!r} is not allowed. Allowed: epsilon, v_prediction, "
                    "sample."
                )
        return (sample - clean) / sigma
