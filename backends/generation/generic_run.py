"""One generation of a pipeline class without a row in the model table, as diffusers itself runs it.

Nothing is replaced but what reports: the schedulers' class counts steps, and the progress bar tells
how many there will be. So every class keeps its own timesteps, guidance and decoding.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import diffusers
import numpy as np
from torch import Tensor, nn

from backends.errors import RequestError, UnsupportedError
from backends.files.generic import CARRIED, carrier
from backends.files.pipeline_calls import IMAGES, VIDEOS
from backends.generation.call_arguments import generator
from backends.generation.latents import to_uint8
from backends.generation.run import Generation
from backends.model_table import ModelSpec
from backends.request import Array, GenerateRequest

logger = logging.getLogger(__name__)

REFUSALS = (ValueError, TypeError, AttributeError)
"""What pipelines raise for arguments that they cannot use."""


def resolve_generic(
    request: GenerateRequest, spec: ModelSpec, *, defaults: Mapping[str, Any]
) -> GenerateRequest:
    """Return the request with the values given at launch filled in. The class has the other ones.

    RequestError for missing or contradicting inputs.
    """
    for field in spec.requires:
        given = (request.image, request.init_image) if field == "image" else (
            getattr(request, field),
        )  # fmt: skip
        if all(value is None or value == "" for value in given):
            raise RequestError(
                f"{field} is missing. {spec.title} needs it: send one as {field!r}.", field=field
            )
    if request.image is not None and request.init_image is not None:
        raise RequestError(
            f"both image and init_image were given, and {spec.title} takes one image. Send one of "
            "them.",
            field="init_image",
        )
    filled = {
        field: getattr(request, field) if getattr(request, field) is not None else default
        for field, default in defaults.items()
    }
    nothing = {"num_inference_steps": spec.num_inference_steps, "guidance_scale": None}
    own = {
        field: spec.parameters.get(carrier(spec.parameters, field) or "", otherwise)
        for field, otherwise in nothing.items()
        if filled.get(field) is None
    }
    if spec.output == "video" and request.fps is None:
        own["fps"] = spec.frames_per_s
    return request.model_copy(update=filled | own)


def generic_arguments(request: GenerateRequest, spec: ModelSpec) -> dict[str, Any]:
    """Return the call's arguments: what was asked for, under the class's own names."""
    found: dict[str, Any] = {}
    for field in CARRIED:
        name = spec.guidance_argument if field == "guidance_scale" else carrier(
            spec.parameters, field
        )  # fmt: skip
        value = getattr(request, field)
        if field == "strength" and field not in request.model_fields_set:
            value = None  # each class has its own default
        if field in _DEFAULTED and value == GenerateRequest.model_fields[field].default:
            value = None
        if name and value is not None:
            found[name] = value
    if "max_area" in spec.parameters and request.height and request.width:
        found["max_area"] = request.height * request.width  # else the class scales to its own
    if "generator" in spec.parameters:
        found["generator"] = generator(request)
    if "output_type" in spec.parameters:
        found["output_type"] = "np"
    return found


_DEFAULTED = ("denoising_end", "control_guidance_start", "control_guidance_end")
"""Fields whose defaults are diffusers' too, so that they need not be passed."""


class GenericGeneration(Generation):
    """The state of one call of a class without a row."""

    def run(self) -> list[tuple[Array, Array | None]]:
        """Return (uint8 frames, None) of the request: one image, or all frames of a video.

        RequestError if the class refuses the arguments before it denoises.
        """
        request, pipe = self._requests[0], self._pipe
        if hasattr(pipe, "scheduler"):
            pipe.scheduler = self._scheduler
        counter = StepCounter(pipe, self._spec.denoisers, on_step=self._step_done)
        with counter.attached(), self._seeded(request):
            try:
                output = pipe(**generic_arguments(request, self._spec))
            except NameError as error:  # a module of diffusers uses a package that it did not find
                raise UnsupportedError(
                    f"{self._spec.title} needs the package {error.name}, which is not installed on "
                    "this host. Install it and start the host again."
                ) from error
            except REFUSALS as error:
                if counter.has_denoised:
                    raise
                raise RequestError(
                    f"{self._spec.title} refuses this request: {' '.join(str(error).split())} It "
                    f"takes: {', '.join(self._spec.parameters)}."
                ) from error
        self.num_steps = counter.num_done
        return [(frames_of(output, self._spec.output), None)]


class StepCounter:
    """Counts the steps of one call of a pipeline, and reports each.

    A step is a call of a scheduler's `step` after the denoiser has run: some classes call it once
    for images and once for sound, others on copies of the scheduler.
    """

    def __init__(
        self, pipe: Any, denoisers: tuple[str, ...], *, on_step: Callable[[int, int, Tensor], None]
    ) -> None:
        """on_step: (index, number of steps as far as it is known, sample)."""
        self._pipe = pipe
        self._denoisers = [getattr(pipe, name) for name in denoisers]
        self._on_step = on_step
        self._expected = 0
        self._begins_loop = False
        self._has_run = False
        self.has_denoised = False
        self.num_done = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for denoiser in self._denoisers:
                stack.enter_context(_watched(denoiser, self._denoised))
            parts = [part for part in vars(self._pipe).values() if _is_pipeline(part)]
            for pipe in (self._pipe, *parts):
                stack.enter_context(_with_bar(pipe, self._expect))
            for scheduler in _schedulers(self._pipe):
                stack.enter_context(_counting(scheduler, self._stepped))
            yield

    def _denoised(self, *_: Any) -> None:
        self._has_run = self.has_denoised = True

    def _expect(self, total: int) -> None:
        """Note a loop of this many steps. A class with two denoisers has two such loops."""
        self._expected, self._begins_loop = self.num_done + total, True

    def _stepped(self, scheduler: Any, sample: Tensor) -> None:
        if self._denoisers and not self._has_run:
            return
        if self._begins_loop:
            total = self._expected - self.num_done
            self._expected = self.num_done + _scheduler_steps(scheduler, total)
        self._has_run = self._begins_loop = False
        self.num_done += 1
        self._expected = max(self._expected, self.num_done)
        self._on_step(self.num_done - 1, self._expected, sample)


_COUNTS = (("order", 1), ("num_inference_steps", None))


def _scheduler_steps(scheduler: Any, total: int) -> int:
    """Return the calls of `step` in a loop of this many inference steps.

    At second order each is two of them except the last; PNDM needs one more in all.
    """
    order, number = (getattr(scheduler, name, otherwise) for name, otherwise in _COUNTS)
    more = 0 if number is None else len(scheduler.timesteps) - number * order
    return total * order + more if -order <= more <= order else total


def _is_pipeline(part: Any) -> bool:
    return isinstance(part, diffusers.DiffusionPipeline)


def _schedulers(pipe: Any) -> list[Any]:
    found = (*pipe.components.values(), getattr(pipe, "scheduler", None))
    return list({id(each): each for each in found if hasattr(type(each), "set_timesteps")}.values())


@contextmanager
def _watched(denoiser: nn.Module, called: Callable[..., None]) -> Iterator[None]:
    handle = denoiser.register_forward_pre_hook(called)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _with_bar(pipe: Any, expect: Callable[[int], None]) -> Iterator[None]:
    """Learn the number of steps from the pipeline's own progress bar."""
    inner = pipe.progress_bar

    @functools.wraps(inner)
    def progress_bar(iterable: Any = None, total: int | None = None) -> Any:
        length = total if iterable is None else len(iterable)
        if length is not None:
            expect(length)
        return inner(iterable, total)

    pipe.progress_bar = progress_bar
    try:
        yield
    finally:
        del pipe.progress_bar


@contextmanager
def _counting(scheduler: Any, stepped: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Give one scheduler a class of its own that reports. Its copies report too."""
    plain = type(scheduler)

    @functools.wraps(plain.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain.step(self, *args, **kwargs)
        stepped(self, result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "step": step}
    scheduler.__class__ = type(plain.__name__, (plain,), names)
    try:
        yield
    finally:
        scheduler.__class__ = plain


def frames_of(output: Any, kind: str) -> Array:
    """Return uint8 (N, H, W, 3) of what a pipeline returned: one image, or all frames of a video.

    output: with a field of IMAGES or VIDEOS, as PIL images, numpy arrays in 0..1 or tensors.
    """
    fields = (*VIDEOS, *IMAGES) if kind == "video" else (*IMAGES, *VIDEOS)
    name = next((name for name in fields if getattr(output, name, None) is not None), None)
    value = getattr(output, name) if name is not None else output[0]
    pixels = _pixels(value)
    while pixels.ndim > 4:  # a batch of videos, of which there is one
        pixels = pixels[0]
    if kind == "image" and len(pixels) > 1:
        logger.warning("the pipeline made %d images; the first is kept", len(pixels))
        pixels = pixels[:1]
    if pixels.shape[-1] != 3:
        pixels = pixels[..., :1].repeat(3, -1) if pixels.shape[-1] < 3 else pixels[..., :3]
    return np.ascontiguousarray(pixels)


def _pixels(value: Any) -> np.ndarray:
    """Return uint8 (..., H, W, C)."""
    if isinstance(value, list | tuple):
        return np.stack([_pixels(each) for each in value])
    if isinstance(value, Tensor):
        value = value.float().cpu().movedim(-3, -1).numpy()
    array = np.asarray(value)
    if array.ndim == 2:
        array = array[..., None]
    return array if array.dtype == np.uint8 else to_uint8(array)
