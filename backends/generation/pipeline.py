"""Load a diffusers pipeline on this rank's device and run it repeatedly.

Used by hosts/ranks/loop.py on every rank, and by benchmarks. Nothing here knows about HTTP or its
own rank.
"""

import copy
import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from backends.errors import CancelledError, ConfigError, HostError, RequestError, UnsupportedError
from backends.files.defaults import embeds_widths
from backends.generation import latents as latent_space
from backends.generation.admission import AtLaunch, require_possible
from backends.generation.batching import require_one_batch
from backends.generation.call_arguments import (
    require_clip_layers,
    resolve,
)
from backends.generation.generic_run import GenericGeneration, with_parameters
from backends.generation.own_class.arguments import resolve_generic
from backends.generation.previews import Previewer
from backends.generation.run import Generation, OnStep, PreparedRequest, size_of
from backends.generation.schedulers import build_scheduler, choose_scheduler
from backends.generation.step_driver import step_facts
from backends.generation.text.prompts import (
    PromptCache,
    compel_prompts,
    require_readable_prompts,
)
from backends.generation.text.unread import UnreadTokens
from backends.loading.caches.step_cache import AnyCache, attached_cache, wanted_cache
from backends.loading.compilation import Compilation
from backends.loading.conversion import convert
from backends.loading.ip_adapter import load_ip_adapters, use_scales
from backends.loading.lora.lora_set import LoraSet
from backends.loading.offload import apply_vae_options, defer_denoisers, place, use_lean_attention
from backends.loading.quantization import quantize
from backends.loading.shared_weights import SharedWeights, require_plain_weights
from backends.loading.upscaling.upscaler import Upscalers
from backends.loading.weights import DTYPES, load_pipe, own_pipeline
from backends.model_table import ModelSpec
from backends.parallel.base import Backend, RunInfo
from backends.parallel.cfg_two_calls import GuidanceChanged
from backends.parallel.regions import quiet_regions
from backends.parallel.vae import attach_patch_decode, detach_patch_decode, splits_decode
from backends.parallel.weight_shards import move
from backends.plan import Exactness, Quality, is_met
from backends.request import (
    Array,
    GenerateRequest,
    GenerateResult,
    LoadRequest,
    asks,
    why_loras_are_fixed,
)
from backends.step_cache_spec import StepCacheSpec, require_step_cache

logger = logging.getLogger(__name__)
# progress bars per component would clutter a server's log
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def load_pipeline(
    spec: ModelSpec,
    load: LoadRequest,
    *,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    is_cut: bool = False,
) -> "LoadedPipeline":
    """Load a diffusers folder, or a single file if the type allows it, onto the device.

    share: (rank, number of ranks), which keep equal shares of what `load.divided` names. is_cut:
    the backend that will be attached keeps a part of the denoiser only, so no other is read.
    Downloads nothing. ConfigError names the component at fault. The order matters: replace weights,
    quantise, place, load LoRAs (LoadedPipeline), compile, and attach the backend last (`attach`).
    """
    pipe = load_pipe(spec, load)
    shared = SharedWeights(pipe, spec, load, share=share, device=device)
    if is_cut:
        defer_denoisers(pipe, spec, load, device=device)
    if load.ip_adapter:
        convert(getattr(pipe, spec.denoiser), DTYPES[load.variant])  # adapters take its dtype
    load_ip_adapters(pipe, spec, load)
    pipe.set_progress_bar_config(disable=True)
    bytes_saved = quantize(pipe, spec, load, device=device, divide_block=shared.divide_block)
    use_lean_attention(pipe, load)
    shared.divide()
    place(pipe, spec, load, device=device, in_main_memory=shared.in_main_memory)
    shared.place()
    apply_vae_options(pipe, load)
    return LoadedPipeline(
        pipe, spec=spec, load=load, device=device, bytes_saved=bytes_saved, shared=shared
    )


class LoadedPipeline:
    """A diffusers pipeline with a backend attached. Each call of it is a Generation (run.py)."""

    def __init__(
        self,
        pipe: Any,
        *,
        spec: ModelSpec,
        load: LoadRequest,
        device: torch.device,
        bytes_saved: Mapping[str, int] = MappingProxyType({}),
        shared: SharedWeights | None = None,
    ) -> None:
        """bytes_saved: component -> bytes that quantisation saved. shared: None for nothing."""
        self.pipe = pipe
        self.load = load
        self.device = device
        self.dtype = DTYPES[load.variant]
        self.signature = inspect.signature(pipe.__call__)
        if (denoiser := getattr(pipe, spec.denoiser, None)) is not None:
            spec = replace(spec, embeds_widths=embeds_widths(denoiser.config))
        self.spec = spec = with_parameters(spec, self.signature)
        self._pristine_scheduler = copy.deepcopy(getattr(pipe, "scheduler", None))
        self.own_scheduler_class = type(self._pristine_scheduler)
        self._backend: Backend | None = None
        self._quality: Quality = "exact"
        self.previewer = Previewer(pipe, spec=spec)
        self._is_resting = False
        self._generation: Generation | None = None
        self.base, self._own_pipe = self, None
        self.loras = LoraSet(pipe, spec)
        self.loras.use({**load.lora, **load.motion_lora})
        self.weighted_prompts = compel_prompts(pipe, spec) if load.compel else None
        self._compilation = Compilation(load.compile) if load.compile is not None else None
        self._step_cache: AnyCache | None = None
        self._use_step_cache(load.step_cache)
        self._bytes_saved = dict(bytes_saved)
        self.shared = shared or SharedWeights(pipe, spec, load, share=(0, 1), device=device)
        self.upscalers = Upscalers(load.upscalers, device=device, dtype=self.dtype)
        self._unread = UnreadTokens(pipe)
        self._prompts = PromptCache(pipe, self._unread, facts=lambda: self._loras_in_use)
        self._loras_in_use: Mapping[str, float] = {}

    def attach(
        self,
        backend: Backend,
        step_cache: StepCacheSpec | None = None,
        *,
        quality: Quality | None = None,
    ) -> None:
        """Attach the step cache, compile the requested models, then attach the backend.

        step_cache: None for that of the load request, if it has one. quality: the level that the
        method meets, if it was measured.
        """
        self._quality = quality or backend.plan.quality
        require_plain_weights(backend, self.load)
        self._use_step_cache(step_cache or self.load.step_cache)
        if self._step_cache is not None:
            require_step_cache(self._step_cache.spec, backend.plan)
            self._step_cache.share(backend.mesh)
        self._fuse_loras(backend)
        if self._compilation is not None:
            self._compilation.attach(self.pipe, self.spec, self._compile_regions(backend))
        self.shared.use(backend.mesh)
        self.forget_prompts()
        if self.load.divided:
            self.loras.measure_again()  # decompositions depend on weights that can be read now
        backend.attach(self.pipe)
        self._backend = backend
        if self.load.parallel_vae and not self._compiles("vae"):
            attach_patch_decode(self._vae, backend.mesh)

    def _use_step_cache(self, asked: StepCacheSpec | None) -> None:
        """Replace the step cache. No backend is attached: a cache must see what a rank computes."""
        if asked == (self._step_cache.spec if self._step_cache is not None else None):
            return
        if self._step_cache is not None:
            self._step_cache.detach()
            self._step_cache = None
        if asked is not None:
            self._step_cache = attached_cache(asked, self.spec, self.pipe)

    def _compile_regions(self, backend: Backend) -> list[nn.Module]:
        """Return the modules to compile.

        A step cache decides between blocks, which no graph can hold: then only the regions between
        attentions.
        """
        find = backend.compile_regions if self._step_cache is None else quiet_regions
        return [part for denoiser in backend.denoisers_of(self.pipe) for part in find(denoiser)]

    def detach(self) -> None:
        """Detach the backend and undo compilation."""
        if self._step_cache is not None:
            self._step_cache.share(None)
        if self._backend is not None:
            detach_patch_decode(self._vae)
            self._backend.detach(self.pipe)
            self._backend = None
            self.loras.measure_again()
        if self._compilation is not None:
            self._compilation.detach()

    def _compiles(self, target: str) -> bool:
        return self.load.compile is not None and target in self.load.compile.targets

    def _fuse_loras(self, backend: Backend) -> None:
        """Fuse LoRAs into weights that are to be compiled, or cut: only plain layers can be."""
        if self._compiles("denoiser") and self.load.can_be_fused:
            self.loras.fuse()
        elif backend.plan.degree("tensor") > 1 and (self.load.lora or self.load.motion_lora):
            self.loras.fuse(backend.denoisers_of(self.pipe))

    def rest(self) -> None:
        """Move the weights to main memory until the next generation, to free the device.

        UnsupportedError with offloading, which moves them itself.
        """
        if self.load.offload is not None:
            raise UnsupportedError(
                f"the weights cannot be kept in main memory: offloading ({self.load.offload}) "
                "moves them already."
            )
        self._move(torch.device("cpu"))
        self.forget_prompts()

    def wake(self) -> None:
        """Move weights that rest in main memory back to the device."""
        if self._is_resting:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        move(self.pipe, device)
        self.shared.move(device)
        self._is_resting = device != self.device

    def forget_prompts(self) -> None:
        """Encode every prompt anew, for all ranks alike: they encode together."""
        self._prompts.forget()

    def check(self, request: GenerateRequest) -> None:
        """Raise RequestError, PlanError or UnsupportedError for a bad request, before any rank
        starts on it.
        """
        self._prepare(request)

    def generate(
        self, request: GenerateRequest, *, on_step: OnStep | None = None
    ) -> GenerateResult:
        """Return one image or video. `request.seed` must be set, so that all ranks use the same."""
        return self.generate_together([request], on_step=on_step)[0]

    @torch.no_grad()
    def generate_together(
        self, requests: Sequence[GenerateRequest], *, on_step: OnStep | None = None
    ) -> list[GenerateResult]:
        """Return the result of each request; several run as rows of one batch.

        A row equals the result of its request alone, up to the order of sums. `seconds` is of the
        whole batch. UnsupportedError if the requests do not fit into one batch.
        """
        if (own := self._serving(requests[0])) is not self:
            return own.generate_together(requests, on_step=on_step)
        started = time.perf_counter()
        prepared = [self._prepare(request) for request in requests]
        if len(requests) > 1:
            plan = self._backend.plan if self._backend is not None else None
            require_one_batch(requests, self.spec, self.load, prepared[0].scheduler, plan)
        self._unread.begin(self.pipe, requests[0].arguments or {})
        generation, rows = self._run(prepared, on_step)
        if rows is None:
            generation, rows = self._run(prepared, on_step)
        generation.clock.end()
        seconds = time.perf_counter() - started
        return [
            GenerateResult(
                frames=frames,
                latents=self._to_client_space(latents, one.request),
                audio=generation.audio,
                seed=one.request.seed,
                resolved=one.described(frames if self.spec.runs_as_is else None),
                num_steps=generation.num_steps,
                exactness=self._exactness(one.run, num_rows=len(requests)),
                seconds=seconds,
                report=self._report(row, len(requests)),
            )
            for row, (one, (frames, latents)) in enumerate(zip(prepared, rows, strict=True))
        ]

    def _run(
        self, prepared: Sequence[PreparedRequest], on_step: OnStep | None
    ) -> tuple[Generation, list[tuple[Array, Array | None]] | None]:
        """Return the generation with its rows; None if they must be computed again, undivided."""
        kind = GenericGeneration if self.spec.runs_as_is else Generation
        with self._begun(prepared[0]):
            generation = kind(self, prepared, on_step=self._step_reporter(on_step))
            self._generation = self.base._generation = generation
            try:
                return generation, generation.run()
            except GuidanceChanged:  # the denoiser was not called as in the first step
                self._backend.refuse_split()
                return generation, None

    @contextmanager
    def _begun(self, prepared: PreparedRequest) -> Iterator[None]:
        """Prepare weights, adapters, backend and step cache for a run, and end it on exit."""
        self.wake()
        self._use_loras(prepared.request)
        use_scales(self.pipe, self.load, prepared.request)
        if self._backend is not None:
            self._backend.mesh.traffic.reset()
            self._backend.begin(prepared.run)
        if self._step_cache is not None:
            self._step_cache.begin(is_on=prepared.run.step_cache is not None)
        self.shared.begin()
        has_failed = is_out_of_step = True
        try:
            yield
            has_failed = is_out_of_step = False
        except Exception as error:
            is_out_of_step = not isinstance(error, CancelledError)
            # others may not have raised it, and would wait for this one
            if self._backend is not None and not isinstance(error, HostError):
                self._backend.mesh.groups.give_up()
            raise
        finally:
            self.shared.end(is_out_of_step=is_out_of_step)
            if has_failed:
                self.forget_prompts()
            if self._backend is not None:
                self._backend.end()
            if self._step_cache is not None:
                self._step_cache.end()
            self.pipe.maybe_free_model_hooks()

    def _step_reporter(self, on_step: OnStep | None) -> OnStep:
        def report(step: int, num_steps: int, sample: Tensor) -> None:
            ran = self._step_cache is None or self._step_cache.step_done(num_steps)
            if self._backend is not None and ran:
                self._backend.step_done()
            if on_step is not None:
                on_step(step, num_steps, sample)

        return report

    def _to_client_space(self, latents: Array | None, request: GenerateRequest) -> Array | None:
        if latents is None:
            return None
        return latent_space.to_latent_space(latents, request.latent_space, vae=self.pipe.vae)

    def _report(self, row: int, num_rows: int) -> dict[str, Any]:
        report = dict(self._backend.report()) if self._backend is not None else {}
        report |= self._generation.report()
        if self._step_cache is not None:
            report["step_cache"] = self._step_cache.report()
        if self._bytes_saved:
            report["bytes_saved"] = self._bytes_saved
        if unread := self._unread.of_row(row, num_rows):
            has_words = self.spec.has_clip_prompts and self.weighted_prompts is None
            advice = "; --compel would read them" if has_words else ""
            logger.warning("the last %d tokens of the prompt were ignored%s", unread, advice)
            report["unread_tokens"] = unread
        return report

    def _serving(self, request: GenerateRequest) -> "LoadedPipeline":
        """Return what runs this request: this, or a copy with the checkpoint's own class."""
        asked = [name for name, value in request if asks(name, value)]
        spec = self.spec.serving(asked)
        if spec is self.spec:
            return self
        placed = {"device": self.device, "dtype": self.dtype}
        self._own_pipe = self._own_pipe or own_pipeline(self.pipe, spec, self.load, **placed)
        own = copy.copy(self)
        own.pipe, own.spec = self._own_pipe, spec
        own.signature = inspect.signature(own.pipe.__call__)
        own.previewer = Previewer(own.pipe, spec=spec)
        return own

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """The stages of the last generation: see StageClock."""
        return self._generation.clock.spans if self._generation is not None else []

    def preview(self, latents: Tensor, row: int = 0) -> Array | None:
        """Return uint8 (h, w, 3) of one image of the current run, from `on_step`'s latents; None
        if the VAE cannot be fitted.
        """
        return self._generation.preview(latents[row : row + 1])

    def _prepare(self, request: GenerateRequest) -> PreparedRequest:
        if (own := self._serving(request)) is not self:
            return own._prepare(request)
        plan = self._backend.plan if self._backend is not None else None
        launch = AtLaunch.of(self.load, why_loras_are_fixed(self.load, plan))
        require_possible(request, self.spec, launch)
        require_clip_layers(request, self.pipe, self.signature)
        if request.compel and self.weighted_prompts is None:
            raise UnsupportedError(
                "compel is not loaded on this host. Leave it out, or start the host with --compel.",
                field="compel",
            )
        require_readable_prompts(request, self.spec)
        if request.mask_image is not None and not self.spec.is_generic:
            self.spec.require(
                self._backend.plan.method if self._backend is not None else "single", "inpainting"
            )
        resolved = self._resolve(request)
        self.upscalers.check(resolved, self.spec)
        choice = choose_scheduler(resolved.scheduler, self.load.scheduler)
        if self.spec.runs_as_is and choice.is_own:
            scheduler = copy.deepcopy(self._pristine_scheduler)
        else:
            scheduler = build_scheduler(
                choice, self._pristine_scheduler, flow=self.spec.flow_matching
            )
        run = RunInfo(
            request=resolved,
            **size_of(resolved, self.spec),
            num_inference_steps=resolved.num_inference_steps,
            order=getattr(scheduler, "order", 1),
            step_cache=wanted_cache(
                self._step_cache, resolved, self.load.step_cache, **step_facts(scheduler, resolved)
            ),
        )
        if self._backend is not None:
            self._require_quality(run)
            self._backend.check(run)
        return PreparedRequest(request=resolved, scheduler=scheduler, run=run)

    def _require_quality(self, run: RunInfo) -> None:
        """Raise UnsupportedError for a request of a quality that the attached method lacks."""
        asked = run.request.quality
        if (
            asked is not None
            and self._backend.exactness_of(run) == "approximate"
            and not is_met(asked, self._quality, num_steps=run.num_inference_steps)
        ):
            raise UnsupportedError(
                f"quality={asked!r} was asked for, but this host runs "
                f"{self._backend.plan.describe()}, which does not meet it in "
                f"{run.num_inference_steps} steps. Leave the field out, or start the host with "
                "--backend=auto or an exact method.",
                field="quality",
            )

    def _resolve(self, request: GenerateRequest) -> GenerateRequest:
        defaults = self._defaults()
        if self.spec.runs_as_is:
            return resolve_generic(request, self.spec, defaults=defaults)
        scale = getattr(self.pipe, "vae_scale_factor", 8)
        return resolve(request, self.spec, defaults=defaults, vae_scale_factor=scale)

    def _use_loras(self, request: GenerateRequest) -> None:
        """Use exactly this request's LoRAs, and switch off those of earlier ones."""
        asked = self.load.lora if request.lora is None else request.lora
        is_new = self.load.offload is not None and not self.loras.has(asked)
        backend = self._backend if is_new else None
        step_cache = self._step_cache.spec if self._step_cache is not None else None
        # diffusers may remove offloading hooks and add them again, which would drop the backend's
        if backend is not None:
            self.detach()
        try:
            self.loras.use({**asked, **self.load.motion_lora})
            self._loras_in_use = asked
        except ConfigError as error:
            raise RequestError(str(error), field="lora") from error
        finally:
            if backend is not None:
                self.attach(backend, step_cache, quality=self._quality)

    def _exactness(self, run: RunInfo, *, num_rows: int) -> Exactness:
        method = self._backend.exactness_of(run) if self._backend is not None else "exact"
        if self._step_cache is not None and self._step_cache.num_skipped:
            return "approximate"
        return (
            "reordered"
            if method == "exact" and (num_rows > 1 or splits_decode(self._vae))
            else method
        )

    @property
    def _vae(self) -> Any:
        """None if the pipeline has none: it may decode otherwise, or in pixels from the start."""
        return getattr(self.pipe, "vae", None)

    def _defaults(self) -> dict[str, Any]:
        return {
            name: getattr(self.load, name)
            for name in ("height", "width", "num_inference_steps", "guidance_scale")
        }
