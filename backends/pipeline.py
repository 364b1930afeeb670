"""ModelSpec + LoadRequest -> a diffusers pipeline on this rank's device, and one generation with it.

Used by hosts/loop.py on every rank, and by benchmarks. Nothing here knows HTTP or which rank it is on.
"""

import copy
import inspect
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from backends import latents as latent_space
from backends.arguments import call_arguments, generator, require_clip_layers, require_embeds_support, resolve, visible_clip_layers
from backends.base import Backend, Run
from backends.errors import ConfigError, UnsupportedError
from backends.model_table import ModelSpec
from backends.request import Array, GenerateRequest, GenerateResult, LoadRequest
from backends.schedule import Schedule
from backends.schedulers import build_scheduler, parse_scheduler
from backends.step_driver import Start, StepDriver

logger = logging.getLogger(__name__)
diffusers.utils.logging.disable_progress_bar()  # a bar per component belongs to a terminal, not into a server's log

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OnStep = Callable[[int, int, Tensor], None]
"""on_step(steps done, steps in all, latents in model space): after each scheduler step, on every rank. An exception ends the run."""


def load_pipeline(spec: ModelSpec, load: LoadRequest, *, device: torch.device) -> "LoadedPipeline":
    """Weights from a diffusers folder (or a single file where the type has one), on the device, ready to attach a backend to.

    Never asks a hub: everything must be in the checkpoint. Raises ConfigError with the component at fault.
    """
    path = Path(load.checkpoint)
    pipeline_class = getattr(diffusers, spec.pipeline)
    given = {**_without_safety_checker(pipeline_class), **_replaced_components(spec, load)}
    arguments: dict[str, Any] = {"dtype": DTYPES[load.variant], "local_files_only": True, **given}
    try:
        if path.is_dir():
            pipe = pipeline_class.from_pretrained(path, variant=_file_variant(path, spec), **arguments)
        elif spec.single_file:
            pipe = _from_single_file(spec, pipeline_class, path, arguments)
        else:
            raise ConfigError(f"checkpoint={path} is a file, but type {spec.name!r} loads from a diffusers folder only. Give the folder.")
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise ConfigError(f"checkpoint={path} does not load as {spec.pipeline}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    _apply_vae_options(pipe, load)
    return LoadedPipeline(pipe, spec=spec, load=load, device=device)


class LoadedPipeline:
    """A diffusers pipeline with a backend attached, and what is needed to run it again and again the same way."""

    def __init__(self, pipe: Any, *, spec: ModelSpec, load: LoadRequest, device: torch.device) -> None:
        self.pipe = pipe
        self.spec = spec
        self.load = load
        self.device = device
        self.dtype = DTYPES[load.variant]
        self.signature = inspect.signature(pipe.__call__)
        self._pristine_scheduler = copy.deepcopy(pipe.scheduler)
        self._backend: Backend | None = None

    def attach(self, backend: Backend) -> None:
        backend.attach(self.pipe)
        self._backend = backend

    def detach(self) -> None:
        if self._backend is not None:
            self._backend.detach(self.pipe)
            self._backend = None

    def check(self, request: GenerateRequest) -> None:
        """Refuse what cannot be done, before any rank starts: RequestError, PlanError or UnsupportedError."""
        self._prepare(request)

    @torch.no_grad()
    def generate(self, request: GenerateRequest, *, on_step: OnStep | None = None) -> GenerateResult:
        """One picture or video. `request.seed` must be drawn already, so that all ranks have the same."""
        started = time.perf_counter()
        resolved, scheduler, run = self._prepare(request)
        if self._backend is not None:
            self._backend.mesh.traffic.reset()
            self._backend.begin(run)
        try:
            frames, latents, num_steps = self._run(resolved, scheduler, on_step)
        finally:
            if self._backend is not None:
                self._backend.end()
            self.pipe.maybe_free_model_hooks()
        return GenerateResult(
            frames=frames,
            latents=latents,
            seed=resolved.seed,
            num_steps=num_steps,
            exactness=self._backend.plan.exactness if self._backend is not None else "exact",
            seconds=time.perf_counter() - started,
            report=dict(self._backend.report()) if self._backend is not None else {},
        )

    def _prepare(self, request: GenerateRequest) -> tuple[GenerateRequest, Any, Run]:
        require_embeds_support(request, self.spec, self.pipe, self.signature)
        require_clip_layers(request, self.pipe, self.signature)
        resolved = resolve(request, self.spec, defaults=self._defaults(), vae_scale_factor=getattr(self.pipe, "vae_scale_factor", 8))
        choice = parse_scheduler(resolved.scheduler if resolved.scheduler is not None else self.load.scheduler)
        scheduler = build_scheduler(choice, self._pristine_scheduler, flow=self.spec.flow_matching)
        run = Run(
            request=resolved,
            height=resolved.height,
            width=resolved.width,
            num_inference_steps=resolved.num_inference_steps,
            order=scheduler.order,
        )
        if self._backend is not None:
            if resolved.quality == "exact" and self._backend.plan.exactness == "approximate":
                raise UnsupportedError(
                    f"quality='exact' was asked for, but this host runs {self._backend.plan.describe()}. "
                    "Leave the field out, or start the host with an exact method."
                )
            self._backend.check(run)
        return resolved, scheduler, run

    def _defaults(self) -> dict[str, Any]:
        return {name: getattr(self.load, name) for name in ("height", "width", "num_inference_steps", "guidance_scale")}

    def _run(self, request: GenerateRequest, scheduler: Any, on_step: OnStep | None) -> tuple[Array, Array | None, int]:
        """uint8 frames, latents in client space (or None), scheduler steps made."""
        if request.latents is not None and self.spec.returns_latents and request.strength == 0:
            clean = request.latents[:1]
            latent_space.to_model_space(clean, pipe=self.pipe, spec=self.spec, device=self.device, dtype=self.dtype)  # checks it
            return latent_space.decode(clean, pipe=self.pipe), clean, 0
        self.pipe.scheduler = scheduler
        schedule = _schedule_of(request)
        arguments = call_arguments(request, self.spec, self.signature, device=self.device, dtype=self.dtype)
        start = self._start(request)
        driver = StepDriver(scheduler, schedule, start=start, on_step=self._step_reporter(on_step), generator=arguments["generator"])
        with driver, visible_clip_layers(self.pipe, request):
            if driver.latents is not None:
                arguments["latents"] = driver.latents
            output = self.pipe(**arguments, output_type="latent" if self.spec.returns_latents else "np")
            output = output.frames if self.spec.output == "video" else output.images
        if not self.spec.returns_latents:
            pixels = output[0] if self.spec.output == "video" else output[:1]
            return latent_space.to_uint8(pixels), None, driver.num_steps
        latents = latent_space.to_client_space(output[:1], pipe=self.pipe, spec=self.spec, height=request.height, width=request.width)
        return latent_space.decode(latents, pipe=self.pipe), latents, driver.num_steps

    def _start(self, request: GenerateRequest) -> Start | None:
        """Where an image-to-image run begins; None for text to image (latents at full strength only set the size)."""
        if request.latents is None or request.strength == 1 or not self.spec.returns_latents:
            return None
        clean = latent_space.to_model_space(request.latents, pipe=self.pipe, spec=self.spec, device=self.device, dtype=self.dtype)
        noise = torch.randn(request.latents[:1].shape, generator=generator(request), dtype=self.dtype).to(self.device)
        return Start(latents=clean, noise=latent_space.pack(noise, spec=self.spec), is_scaled_by_pipeline=self.spec.scales_initial_latents)

    def _step_reporter(self, on_step: OnStep | None) -> OnStep:
        def report(index: int, num_steps: int, sample: Tensor) -> None:
            if self._backend is not None:
                self._backend.step_done()
            if on_step is not None:
                on_step(index + 1, num_steps, sample)

        return report


def _schedule_of(request: GenerateRequest) -> Schedule:
    return Schedule(
        num_inference_steps=request.num_inference_steps,
        strength=request.strength if request.latents is not None else 1.0,
        denoising_end=request.denoising_end,
        sigmas=request.sigmas,
        timesteps=request.timesteps,
    )


def _without_safety_checker(pipeline_class: type) -> dict[str, Any]:
    """Results are latents as well as pictures, so a checker at the end of the pipeline would see nothing: do not load it."""
    parameters = inspect.signature(pipeline_class.__init__).parameters
    return {name: value for name, value in (("safety_checker", None), ("requires_safety_checker", False)) if name in parameters}


def _replaced_components(spec: ModelSpec, load: LoadRequest) -> dict[str, Any]:
    """Components that come from elsewhere than the checkpoint."""
    dtype = DTYPES[load.variant]
    components: dict[str, Any] = {}
    if load.motion_adapter is not None and "motion_adapter" in spec.components:
        components["motion_adapter"] = diffusers.MotionAdapter.from_pretrained(load.motion_adapter, dtype=dtype, local_files_only=True)
    if load.vae is not None:
        components["vae"] = _load_vae(Path(load.vae), Path(load.checkpoint), dtype)
    return components


def _load_vae(path: Path, checkpoint: Path, dtype: torch.dtype) -> Any:
    try:
        if path.is_dir():
            return diffusers.AutoencoderKL.from_pretrained(path, dtype=dtype, local_files_only=True)
        config = checkpoint / "vae"
        return diffusers.AutoencoderKL.from_single_file(str(path), config=str(config), dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"vae={path} does not load: {error}") from error


def _from_single_file(spec: ModelSpec, pipeline_class: Any, path: Path, arguments: dict[str, Any]) -> Any:
    """A single .safetensors in its original layout, and beside it the folder of its name that keeps diffusers offline.

    The folder holds the configuration. If it has weights of the text encoders too, the file is taken for the denoiser alone, as FLUX is
    published, and the rest comes from the folder.
    """
    folder = path.with_suffix("")
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"checkpoint={path} is a single file, and the folder {folder} with its configuration (model_index.json, tokenizers, "
            "config.json files; no weights needed) is not there. Put it beside the file, or give a diffusers folder."
        )
    if not any(folder.glob("text_encoder*/*.safetensors")):
        return pipeline_class.from_single_file(str(path), config=str(folder), **arguments)
    class_name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[spec.denoiser][1]
    denoiser = getattr(diffusers, class_name).from_single_file(
        str(path), config=str(folder), subfolder=spec.denoiser, dtype=arguments["dtype"], local_files_only=True
    )
    return pipeline_class.from_pretrained(folder, **{spec.denoiser: denoiser}, **arguments)


def _file_variant(path: Path, spec: ModelSpec) -> str | None:
    """'fp16' where the folder holds only files such as diffusion_pytorch_model.fp16.safetensors."""
    folder = path / spec.denoiser
    names = [file.name for file in folder.glob("*.safetensors")] or [file.name for file in folder.glob("*.bin")]
    variants = {name.split(".")[1] for name in names if name.count(".") >= 2}
    is_only_variants = bool(names) and all(name.count(".") >= 2 for name in names)
    return sorted(variants)[0] if is_only_variants and not any("-of-" in variant for variant in variants) else None


def _apply_vae_options(pipe: Any, load: LoadRequest) -> None:
    for wanted, name in ((load.enable_vae_tiling, "enable_tiling"), (load.enable_vae_slicing, "enable_slicing")):
        if wanted:
            try:
                getattr(pipe.vae, name)()
            except (AttributeError, NotImplementedError) as error:
                raise UnsupportedError(f"{name} is not available for {type(pipe.vae).__name__}. Leave the option out.") from error
