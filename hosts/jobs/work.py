"""How much a request asks for, before it has run. Pure arithmetic; imports no torch."""

from dataclasses import dataclass

from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The size of one job. What the request leaves out is the host's default, else the model
    type's.
    """

    height: int
    """Of each frame, in pixels."""
    width: int
    """Of each frame, in pixels."""
    num_frames: int
    """1 for an image."""
    num_steps: int
    """Scheduler steps."""

    @property
    def pixels(self) -> float:
        """Of all frames. Encoding and decoding are measured by them."""
        return float(self.height * self.width * self.num_frames)

    @property
    def pixel_steps(self) -> float:
        """The unit in which the work of the steps is measured: one pixel in one step."""
        return self.pixels * self.num_steps


def work_of(request: GenerateRequest, spec: ModelSpec, load: LoadRequest) -> Work:
    """Return the work of a request to a host that was loaded like this."""
    return Work(
        height=request.height or load.height or spec.height,
        width=request.width or load.width or spec.width,
        num_frames=request.num_frames or spec.num_frames,
        num_steps=_num_own_steps(request)
        or request.num_inference_steps
        or load.num_inference_steps
        or spec.num_inference_steps,
    )


def _num_own_steps(request: GenerateRequest) -> int:
    """Return the number of steps of the request's own schedule, or 0 if it has none. N + 1 sigmas
    are N steps: the last one is the level at which the last step ends.
    """
    return len(request.timesteps or ()) or max(0, len(request.sigmas or ()) - 1)
