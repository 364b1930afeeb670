"""One generation: a call of a loaded diffusers pipeline for requests that fit into one batch."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backends.errors import RequestError
from backends.generation import latents as latent_space
from backends.generation.call_arguments import (
    call_arguments,
    generator,
    own_arguments,
    visible_clip_layers,
)
from backends.generation.step_driver import EndRun, InitialLatents, StepDriver
from backends.generation.step_window import schedule_of
from backends.generation.text.prompts import WeightedPrompts, a1111_prompts
from backends.loading.controlnet import control_arguments
from backends.loading.ip_adapter import image_arguments
from backends.model_table import ModelSpec
from backends.parallel.base import RunInfo
from backends.request import Array, Audio, GenerateRequest, enlarges_only

if TYPE_CHECKING:
    from backends.generation.pipeline import LoadedPipeline

OnStep = Callable[[int, int, Tensor], None]
"""on_step(steps done, steps in total, latents in model space), called after each scheduler step on
every rank. An exception ends the run; EndRun ends it with an image, where latents are returned.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A checked request with everything that its run needs."""

    request: GenerateRequest
    """With all defaults filled in."""
    scheduler: Any
    """A diffusers scheduler that no other run uses."""
    run: RunInfo
    """The request as the backend sees it."""

    def described(self, frames: Array | None = None) -> dict[str, Any]:
        """Return the values that were used, without images and arrays.

        frames: (N, height, width, channels), of a class that may have chosen another size.
        """
        fields = GenerateRequest.model_fields
        values = {name: getattr(self.request, name) for name in fields}
        readable = {
            name: value
            for name, value in values.items()
            if isinstance(value, str | int | float | dict)
            and value != fields[name].default
            and name != "arguments"  # may hold images
        }
        size = {} if frames is None else {"height": frames.shape[1], "width": frames.shape[2]}
        return {**readable, **size, "scheduler": type(self.scheduler).__name__}


@dataclass(slots=True)
class StageClock:
    """The consecutive stages of one generation, without gaps between them."""

    # (stage, start in seconds since 1970, duration in seconds)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    _stage: str = "encode"
    _since: float = field(default_factory=time.perf_counter)
    _zero: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def next(self, stage: str) -> None:
        """End the current stage and begin `stage`."""
        now = time.perf_counter()
        self.spans.append((self._stage, self._zero + self._since, now - self._since))
        self._stage, self._since = stage, now

    def end(self) -> None:
        """End the last stage. A step that began after the last one was done counts as decoding."""
        self.next("")

    def seconds(self) -> dict[str, float]:
        """Return the total duration of each stage, in order of first appearance."""
        sums: dict[str, float] = {}
        for stage, _, seconds in self.spans:
            sums[stage] = sums.get(stage, 0.0) + seconds
        return sums


class Generation:
    """The state of one call. All settings except prompts and noise are the first request's."""

    def __init__(
        self, loaded: "LoadedPipeline", prepared: Sequence[PreparedRequest], *, on_step: OnStep
    ) -> None:
        self._loaded = loaded
        self._pipe, self._spec = loaded.pipe, loaded.spec
        self._requests = [one.request for one in prepared]
        self._scheduler = prepared[0].scheduler
        self._on_step = on_step
        self.run_info = prepared[0].run
        self.clock = StageClock()
        self.num_steps = 0
        """Scheduler steps executed."""
        self.audio: Audio | None = None
        """The sound of the video that was made, if it has one."""
        self.has_ended_early = False
        """Whether a step ended the run, with an image of what it would lead to."""

    def run(self) -> list[tuple[Array, Array | None]]:
        """Return (uint8 frames, latents in client space or None) for each request."""
        first = self._requests[0]
        if first.upscaler is None:
            return self._generated()
        upscaler = self._loaded.upscalers.named(first.upscaler)
        if enlarges_only(first):
            return [(upscaler.enlarge(np.asarray(first.init_image)[None]), None)]
        return [(upscaler.enlarge(frames), latents) for frames, latents in self._generated()]

    def preview(self, latents: Tensor) -> Array | None:
        """Return uint8 (h, w, 3) of `on_step`'s latents of one image; None if it cannot."""
        run = self.run_info
        return self._loaded.previewer.image(latents, height=run.height, width=run.width)

    def report(self) -> dict[str, Any]:
        """Return the seconds of each stage, and whether a step ended the run."""
        stages = {stage: round(seconds, 4) for stage, seconds in self.clock.seconds().items()}
        return {"stages": stages, **({"ended_early": True} if self.has_ended_early else {})}

    def _generated(self) -> list[tuple[Array, Array | None]]:
        request = self._with_initial_latents(self._requests[0])
        has_latents = request.latents is not None and self._spec.returns_latents
        if has_latents and request.strength == 0:
            return [self._decoded(request)]
        output = self._call(request)
        if not self._spec.returns_latents:
            pixels = output[0] if self._spec.output == "video" else output[:1]
            return [(latent_space.as_result(pixels), None)]
        latents = latent_space.to_client_space(
            output[: len(self._requests)], pipe=self._pipe, spec=self._spec, **_size(request)
        )
        # one by one: decoding the whole batch would need more memory
        rows = np.split(latents, len(self._requests))
        return [(latent_space.decode(row, pipe=self._pipe), row) for row in rows]

    def _with_initial_latents(self, request: GenerateRequest) -> GenerateRequest:
        """Encode init_image, or convert the request's latents to the VAE's scale."""
        if request.init_image is not None:
            start = latent_space.encode(request.init_image, pipe=self._pipe, **_size(request))
        elif request.latents is not None and self._spec.returns_latents:
            start = latent_space.from_latent_space(
                request.latents, request.latent_space, vae=self._pipe.vae
            )
        else:
            return request
        return request.model_copy(update={"latents": start})

    def _decoded(self, request: GenerateRequest) -> tuple[Array, Array]:
        """Return pixels and latents at strength 0, where nothing is denoised."""
        clean = request.latents[:1]
        self._to_model_space(clean)  # checks the shape
        return latent_space.decode(clean, pipe=self._pipe), clean

    def _call(self, request: GenerateRequest) -> Any:
        """Run the diffusers pipeline. Return latents, or pixels if the type returns no latents."""
        self._pipe.scheduler = self._scheduler
        arguments = self._arguments(request)
        driver = StepDriver(
            self._scheduler,
            schedule_of(request),
            start=self._initial_latents(request),
            on_step=self._step_done,
            generator=arguments["generator"],
        )
        driver.on_start = lambda: self.clock.next("step")
        masked = latent_space.beside_latents(self._scheduler, self._mask_input(request))
        with driver, masked, visible_clip_layers(self._pipe, request), self._seeded(request):
            if driver.latents is not None:
                arguments["latents"] = driver.latents
            kind = "latent" if self._spec.returns_latents else "np"
            try:
                with _checks_of_the_class(self._pipe, self._spec):
                    output = self._pipe(**arguments, output_type=kind)
            except EndRun:
                self.num_steps, self.has_ended_early = driver.num_done, True
                return driver.denoised()
        self.num_steps = driver.num_steps
        return output.frames if self._spec.output == "video" else output.images

    def _arguments(self, request: GenerateRequest) -> dict[str, Any]:
        loaded = self._loaded
        arguments = call_arguments(
            request, self._spec, loaded.signature, device=loaded.device, dtype=loaded.dtype
        )
        prompts, embeddings = self._weighted_prompts(request), loaded.loras.embeddings
        if prompts is not None:
            for name in ("prompt", "negative_prompt"):
                arguments.pop(name, None)
            arguments |= prompts.arguments(request, read=embeddings.in_words)
        if len(self._requests) > 1:
            arguments |= own_arguments(self._requests, arguments)
        arguments = embeddings.arguments(arguments, loaded.signature.parameters)
        added = {
            **control_arguments(request, loaded.load, self._spec),
            **image_arguments(request, loaded.load),
        }
        accepted = loaded.signature.parameters
        return arguments | {name: value for name, value in added.items() if name in accepted}

    def _weighted_prompts(self, request: GenerateRequest) -> WeightedPrompts | None:
        """Return what reads the request's prompts, unless the pipeline itself does."""
        if request.prompt_embeds is not None:
            return None
        if request.prompt_syntax is not None:
            return a1111_prompts(self._pipe, self._spec, clip_skip=request.clip_skip)
        return self._loaded.weighted_prompts if request.compel is not False else None

    @contextmanager
    def _seeded(self, request: GenerateRequest) -> Iterator[None]:
        """Seed torch's global generators, which HunyuanDiT's ControlNet uses, on every rank."""
        device = self._loaded.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(request.seed)
            yield

    def _initial_latents(self, request: GenerateRequest) -> InitialLatents | None:
        """Return where an image-to-image or inpainting run begins.

        None for text to image, where latents at full strength only set the size.
        """
        is_whole = request.strength == 1 and request.first_step == 0 and request.mask_image is None
        if request.latents is None or not self._spec.returns_latents or is_whole:
            return None
        noise = torch.randn(
            request.latents[:1].shape, generator=generator(request), dtype=self._loaded.dtype
        ).to(self._loaded.device)
        is_noisy = request.first_step > 0 and request.init_image is None
        return InitialLatents(
            latents=self._to_model_space(request.latents),
            noise=None if is_noisy else latent_space.pack(noise, spec=self._spec),
            mask=None if self._spec.reads_mask else self._mask(request),
            is_scaled_by_pipeline=self._spec.scales_initial_latents,
        )

    def _mask(self, request: GenerateRequest) -> Tensor | None:
        if request.mask_image is None:
            return None
        mask = latent_space.mask(
            request.mask_image, pipe=self._pipe, spec=self._spec, **_size(request)
        )
        return mask.to(self._loaded.device)

    def _mask_input(self, request: GenerateRequest) -> Tensor | None:
        """Return (1, 1 + C, h, w): the mask and the masked image, where the denoiser reads them."""
        if not self._spec.reads_mask:
            return None
        shown = latent_space.encode(
            request.init_image, pipe=self._pipe, hidden=request.mask_image, **_size(request)
        )
        return torch.cat([self._mask(request)[:, :1], self._to_model_space(shown)], dim=1)

    def _to_model_space(self, latents: Array) -> Tensor:
        return latent_space.to_model_space(
            latents,
            pipe=self._pipe,
            spec=self._spec,
            device=self._loaded.device,
            dtype=self._loaded.dtype,
        )

    def _step_done(self, index: int, num_steps: int, sample: Tensor) -> None:
        self._on_step(index + 1, num_steps, sample)
        self.clock.next("decode" if index + 1 == num_steps else "step")


CHECKS = "check_inputs"


@contextmanager
def _checks_of_the_class(pipe: Any, spec: ModelSpec) -> Iterator[None]:
    """Let what the class's own checks refuse be the client's mistake, on all ranks alike."""
    checks = getattr(pipe, CHECKS, None)
    if checks is None:
        yield
        return

    @functools.wraps(checks)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return checks(*args, **kwargs)
        except (ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            raise RequestError(f"{spec.title} refuses this request: {said}") from error

    setattr(pipe, CHECKS, checked)
    try:
        yield
    finally:
        delattr(pipe, CHECKS)


def size_of(request: GenerateRequest, spec: ModelSpec) -> dict[str, int]:
    """Return height and width of the result as far as they are known before it is made."""
    found = request.init_image or request.image
    decides = spec.is_generic and "height" not in spec.parameters
    image = found if decides and isinstance(found, Image.Image) else None
    return {
        "height": request.height or (image.height if image else spec.height),
        "width": request.width or (image.width if image else spec.width),
    }


def _size(request: GenerateRequest) -> dict[str, int]:
    return {"height": request.height, "width": request.width}
