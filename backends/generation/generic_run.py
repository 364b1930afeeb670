"""One generation of a pipeline class as diffusers itself runs it: one without a row in the model
table, or whose row lists what it takes.

Nothing is replaced but what reports: the schedulers' method `step` counts, and the progress bar
tells how many there will be. So every class keeps its own timesteps, guidance and decoding.
"""

import functools
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import Parameter, Signature
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.errors import RequestError, UnsupportedError
from backends.files.pipeline_calls import IMAGES, VIDEOS
from backends.generation.call_arguments import generator
from backends.generation.latents import as_result
from backends.generation.own_class.arguments import asked_arguments, with_files
from backends.generation.run import Generation
from backends.model_table import ModelSpec
from backends.request import Array, Audio, GenerateRequest

logger = logging.getLogger(__name__)

RGBA = 4
REFUSALS = (ValueError, TypeError, AttributeError, ZeroDivisionError)
"""What pipelines raise for arguments that they cannot use."""


def with_parameters(spec: ModelSpec, signature: Signature) -> ModelSpec:
    """Return the spec of a class that runs as it is, with the arguments of its call and their
    defaults.
    """
    if spec.parameters or not spec.runs_as_is:
        return spec
    found = {
        name: None if parameter.default is Parameter.empty else parameter.default
        for name, parameter in signature.parameters.items()
    }
    return replace(spec, parameters=MappingProxyType(found))


def generic_arguments(request: GenerateRequest, spec: ModelSpec) -> dict[str, Any]:
    """Return the call's arguments: what was asked for, under the class's own names."""
    make = functools.partial(generator, request)
    return asked_arguments(request, spec, generator=make, read=own_argument)


def own_argument(value: Any) -> Any:
    """Return the value of an argument that a request brings, as hosts/http/decode.py checked it."""
    return with_files(value, _read)


def _read(kind: str, file: io.BytesIO) -> Any:
    if kind == "image":
        return Image.open(file).convert("RGB")
    return torch.from_numpy(np.load(file, allow_pickle=False))


def with_channels(arguments: dict[str, Any], pipe: Any) -> dict[str, Any]:
    """Return the arguments with images of the four channels that some VAEs read: layers have
    transparent parts.
    """
    config = getattr(getattr(pipe, "vae", None), "config", {})
    if config.get("input_channels") != RGBA:
        return arguments

    def converted(value: Any) -> Any:
        return value.convert("RGBA") if isinstance(value, Image.Image) else value

    return pytree.tree_map(converted, arguments)


class GenericGeneration(Generation):
    """The state of one call of a class without a row."""

    _sizes: Sequence[list[int]] = ()
    """[height, width] that the request has, and that the class has made instead."""

    def run(self) -> list[tuple[Array, Array | None]]:
        """Return (uint8 frames, None) of the request: one image, or all frames of a video.

        RequestError if the class refuses the arguments before it denoises.
        """
        request, pipe = self._requests[0], self._pipe
        for each in (pipe, self._loaded.base.pipe):  # a backend is attached to the latter
            if hasattr(each, "scheduler"):
                each.scheduler = self._scheduler
        is_own = type(self._scheduler) is self._loaded.own_scheduler_class
        counter = StepCounter(
            pipe, self._spec.denoisers, on_step=self._step_done, keeps_samples=not is_own
        )
        denoisers = [getattr(pipe, name) for name in self._spec.denoisers]
        with counter.attached(), self._seeded(request), _limited_to_positions(denoisers):
            try:
                arguments = generic_arguments(request, self._spec)
                arguments = self._placed(arguments, request.arguments or {})
                output = pipe(**with_channels(arguments, pipe))
            except NameError as error:  # a module of diffusers uses a package that it did not find
                raise UnsupportedError(
                    f"{self._spec.title} needs the package {error.name}, which is not installed on "
                    "this host. Install it and start the host again."
                ) from error
            except ImportError as error:
                raise UnsupportedError(
                    f"{self._spec.title} needs a package that is not installed on this host: "
                    f"{' '.join(str(error).split())}"
                ) from error
            except REFUSALS as error:
                if counter.has_denoised:
                    raise
                raise RequestError(
                    f"{self._spec.title} refuses this request: {' '.join(str(error).split())} It "
                    f"takes: {', '.join(self._spec.parameters)}."
                ) from error
        self.num_steps = counter.num_done
        self.audio = audio_of(output, pipe)
        frames = frames_of(output, self._spec.output)
        asked, made = (request.height, request.width), frames.shape[1:3]
        if None not in asked and asked != made:
            self._sizes = [list(asked), list(made)]
            logger.warning(
                "%s made %d x %d of %d x %d: it scales to sizes of its own",
                *(self._spec.title, *made[::-1], *asked[::-1]),
            )
        return [(frames, None)]

    def report(self) -> dict[str, Any]:
        return super().report() | ({"sizes": self._sizes} if self._sizes else {})

    def _placed(self, arguments: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Move the tensors that a request brought to the device, in the pipeline's dtype."""
        kind = {"device": self._loaded.device, "dtype": self._loaded.dtype}
        tensors = {name: arguments[name] for name in own if isinstance(arguments[name], Tensor)}
        return arguments | {name: value.to(**kind) for name, value in tensors.items()}


class StepCounter:
    """Counts the steps of one call of a pipeline, and reports each.

    A step is a call of a scheduler's `step` after the denoiser has run: some classes call it once
    for images and once for sound, others on copies of the scheduler.
    """

    def __init__(
        self,
        pipe: Any,
        denoisers: tuple[str, ...],
        *,
        on_step: Callable[[int, int, Tensor], None],
        keeps_samples: bool = False,
    ) -> None:
        """on_step: (index, number of steps as far as it is known, sample). keeps_samples: the
        scheduler gets samples of its own. Kandinsky 5 and SkyReels write the result over what they
        passed, which schedulers of several orders keep. Their own are left as diffusers has it.
        """
        self._keeps_samples = keeps_samples
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
                counted = _CountedStep(scheduler, self._stepped, self._keeps_samples)
                stack.enter_context(_counting(scheduler, counted))
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
    """Return those whose steps can be counted: one has methods of other names."""
    found = (*pipe.components.values(), getattr(pipe, "scheduler", None))
    counted = ("set_timesteps", "step")
    return list(
        {
            id(each): each for each in found if all(hasattr(type(each), name) for name in counted)
        }.values()
    )


@contextmanager
def _watched(denoiser: nn.Module, called: Callable[..., None]) -> Iterator[None]:
    handle = denoiser.register_forward_pre_hook(called)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _limited_to_positions(denoisers: Sequence[nn.Module]) -> Iterator[None]:
    """Refuse a prompt that is longer than the denoiser's table of positions, on all ranks alike."""
    with ExitStack() as stack:
        for denoiser in denoisers:
            hook = denoiser.register_forward_pre_hook(_require_positions, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _require_positions(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise RequestError if Qwen-Image's table ends before the texts do, which stand in it after
    half the longest side of the images. What describes an image for the prompt counts too.
    """
    table = getattr(getattr(denoiser, "pos_embed", None), "pos_freqs", None)
    texts, shapes = kwargs.get("encoder_hidden_states"), kwargs.get("img_shapes")
    if table is None or texts is None or not shapes:
        return
    images = shapes[0] if isinstance(shapes[0], list) else [shapes[0]]
    most = len(table) - max(max(height, width) // 2 for _, height, width in images)
    if texts.shape[1] > most:
        raise RequestError(
            f"prompt is too long: with what describes its images it has {texts.shape[1]} tokens, "
            f"and the model has positions for {most}. Send a shorter one.",
            field="prompt",
        )


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


class _CountedStep:
    """The method `step` of one scheduler, which reports. A deep copy is that of the scheduler's
    copy, so that copies report too.

    The scheduler keeps its class: some pipelines compare it.
    """

    def __init__(
        self, scheduler: Any, stepped: Callable[[Any, Tensor], None], keeps_samples: bool
    ) -> None:
        self._scheduler = scheduler
        self._stepped = stepped
        self._keeps_samples = keeps_samples
        functools.update_wrapper(self, type(scheduler).step.__get__(scheduler))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._keeps_samples:
            args, kwargs = (*args[:2], *map(_copied, args[2:])), _copied_sample(kwargs)
        result = type(self._scheduler).step(self._scheduler, *args, **kwargs)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        self._stepped(self._scheduler, sample)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CountedStep":
        scheduler = memo.get(id(self._scheduler), self._scheduler)
        return _CountedStep(scheduler, self._stepped, self._keeps_samples)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _copied_sample(named: dict[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if name == "sample" else value for name, value in named.items()}


@contextmanager
def _counting(scheduler: Any, step: _CountedStep) -> Iterator[None]:
    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


SOUND = ("audio", "sound")
"""Fields of diffusers' outputs that hold the sound beside a video."""


def audio_of(output: Any, pipe: Any) -> Audio | None:
    """Return the sound that a pipeline made beside its video; None if it made none.

    output: with the field `audio` or `sound`, of shape (1, samples) or (1, channels, samples).
    UnsupportedError if nothing says how many samples are a second: neither the output, nor the
    pipeline, nor its vocoder.
    """
    sound = next(
        (found for name in SOUND if (found := getattr(output, name, None)) is not None), None
    )
    if sound is None:
        return None
    config = getattr(getattr(pipe, "vocoder", None), "config", {})
    rates = [config.get(name) for name in ("output_sampling_rate", "sampling_rate")]
    own = (getattr(output, "sampling_rate", None), getattr(pipe, "audio_sample_rate", None))
    rate = next((rate for rate in (*own, *rates) if rate), None)
    if rate is None:
        raise UnsupportedError(
            f"{type(pipe).__name__} made sound, and nothing says its sampling rate. Use a "
            "checkpoint whose vocoder's config.json has output_sampling_rate."
        )
    samples = torch.as_tensor(sound[0]).float().cpu().numpy()
    return Audio(samples=np.atleast_2d(samples).clip(-1, 1), sampling_rate=int(rate))


def frames_of(output: Any, kind: str) -> Array:
    """Return uint8 (N, H, W, C) of what a pipeline returned: its images, or all frames of a video.

    C is 3, or 4 with transparency. output: with a field of IMAGES or VIDEOS, as PIL images, numpy
    arrays in 0..1 or tensors.
    """
    fields = (*VIDEOS, *IMAGES) if kind == "video" else (*IMAGES, *VIDEOS)
    name = next((name for name in fields if getattr(output, name, None) is not None), None)
    value = getattr(output, name) if name is not None else output[0]
    pixels = _pixels(value)
    while pixels.ndim > 4:  # a batch of videos, of which there is one
        pixels = pixels[0]
    if kind == "image" and pixels.shape[-1] == 4:
        return np.ascontiguousarray(pixels)
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
    return array if array.dtype == np.uint8 else as_result(array)
