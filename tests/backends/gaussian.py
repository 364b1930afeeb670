"""A denoiser that is never wrong: the data is a Gaussian, so the best prediction and the sampler's
exact result are formulas.

With it a test says where a sampler must end, whatever its scaling, order and count of timesteps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.generation.step_driver import InitialLatents, StepDriver
from backends.generation.step_window import Schedule

MEAN, STD = 0.5, 0.3
SHAPE = (1, 4, 16, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """latents: the result. timesteps: as the denoiser was shown them. sigmas: the noise levels that
    stand for them.
    """

    latents: Tensor
    num_steps: int
    timesteps: list[float]
    sigmas: list[float]
    denoised: list[Tensor]
    """StepDriver.denoised after each step."""
    clean: list[Tensor]
    """What the denoiser's predictions meant."""


def sample(
    scheduler,
    steps: int = 30,
    *,
    start: InitialLatents | None = None,
    mu: float | None = None,
    on_step=None,
    **window,
) -> Run:
    """The loop of a pipeline. Without a start, from noise of seed 0."""
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule(num_inference_steps=steps, **window)
    is_flow = samples_flow(scheduler)
    with StepDriver(
        scheduler, schedule, start=start, on_step=on_step, generator=generator
    ) as driver:
        scheduler.set_timesteps(num_inference_steps=schedule.num_inference_steps, mu=mu)
        latents = driver.latents if start else torch.randn(SHAPE, generator=generator)
        if not is_flow:
            latents = latents * scheduler.init_noise_sigma
        timesteps, denoised, clean = scheduler.timesteps, [], []
        for timestep in timesteps:
            if is_flow:
                sigma = float(timestep) / scheduler.config.num_train_timesteps
                output = velocity(latents, sigma)
                clean.append(latents - sigma * output)
            else:
                model_input = scheduler.scale_model_input(latents, timestep)
                output = _diffusion_output(scheduler, model_input, float(timestep))
                clean.append(_clean(model_input, _sigma(scheduler, float(timestep))))
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
            denoised.append(driver.denoised())
    shown = timesteps.tolist()
    sigmas = [
        t / scheduler.config.num_train_timesteps if is_flow else _sigma(scheduler, t) for t in shown
    ]
    return Run(
        latents=latents,
        num_steps=driver.num_steps,
        timesteps=shown,
        sigmas=sigmas,
        denoised=denoised,
        clean=clean,
    )


def samples_flow(scheduler) -> bool:
    """Whether the scheduler, as configured, expects a flow-matching model."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def velocity(latents: Tensor, sigma: float) -> Tensor:
    """noise - clean, of latents = (1 - sigma) * clean + sigma * noise."""
    clean = MEAN + STD**2 * (1 - sigma) * (latents - (1 - sigma) * MEAN) / (
        STD**2 * (1 - sigma) ** 2 + sigma**2
    )
    return (latents - clean) / sigma


def _diffusion_output(scheduler, model_input: Tensor, timestep: float) -> Tensor:
    """Noise or v, of a model input with unit variance of noise and data together (the
    variance-preserving scaling).
    """
    sigma = _sigma(scheduler, timestep)
    noisy, clean = model_input * (1 + sigma**2) ** 0.5, _clean(model_input, sigma)
    noise = (noisy - clean) / sigma
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return (noise - sigma * clean) / (1 + sigma**2) ** 0.5


def _clean(model_input: Tensor, sigma: float) -> Tensor:
    noisy = model_input * (1 + sigma**2) ** 0.5
    return (STD**2 * noisy + sigma**2 * MEAN) / (STD**2 + sigma**2)


def _sigma(scheduler, timestep: float) -> float:
    """The noise level that a model trained with this config understands under `timestep`."""
    if scheduler.config.get("timestep_type") == "continuous":
        return float(torch.tensor(4 * timestep).exp())
    log_sigmas = 0.5 * torch.log((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)
    below = min(int(timestep), len(log_sigmas) - 2)
    return float(torch.lerp(log_sigmas[below], log_sigmas[below + 1], timestep - below).exp())


def noise() -> Tensor:
    """What `sample` starts from without a start."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def exact(clean: Tensor | float, noise: Tensor, sigma: float, *, is_flow: bool) -> Tensor:
    """Where the probability flow leads from `clean` noised to level `sigma`: every quantile to its
    quantile of the data.
    """
    signal = 1 - sigma if is_flow else 1.0
    noisy = signal * clean + sigma * noise
    return MEAN + STD * (noisy - signal * MEAN) / (signal**2 * STD**2 + sigma**2) ** 0.5
