"""Training stage `unet`: the UNet and both text encoders, jointly, on cached latents.

The schedule runs in wall time, so that it ends on time on any machine. The state is saved every few
minutes, and a restart continues from it.
"""

import copy
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from demo.data import held_out_scenes, training_images
from demo.judge import MEASURES, judge
from demo.latents import from_uint8, to_latents, to_pixels, to_uint8
from demo.model import (
    TextToLatents,
    load_tokenizer,
    make_scheduler,
    start_from,
    token_ids,
    train_tokenizer,
)

logger = logging.getLogger(__name__)

LEARNING_RATE = 1e-3
WARM_UP_STEPS = 60
BATCH = {128: 16, 256: 8}
AVERAGE_DECAY = 0.998
NOISE_BIAS = {
    128: 0.85,
    256: 0.75,
}  # t = 1000 u ** bias: a larger image needs more noise to lose its layout
CHUNK = 1000
SAVE_EVERY_S = 180.0
EVALUATE_EVERY_S = 900.0
VALIDATION_SEED = 77  # different held-out captions from the evaluation set's
GUIDANCE = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Duration of the stage and the division of its time between image sizes."""

    seconds: float
    folder: Path
    seed: int = 0
    start: Path | None = None  # earlier checkpoint to start from
    large_share: float = (
        0.0  # of the time, on 256 px images; one costs about as much as four of 128 px
    )


def write_latents(folder: Path, *, size: int, chunks: int, seed: int) -> None:
    """Cache the latents of `chunks` thousand training images. Existing chunks are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(chunks):
        target = folder / f"latents_{size}_{number:03d}.pt"
        if target.exists():
            continue
        images, captions = training_images(CHUNK, seed=seed + 1000 * size + number, size=size)
        latents = torch.cat([to_latents(from_uint8(part)) for part in np.array_split(images, 20)])
        torch.save({"latents": latents.half(), "captions": captions}, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)


class Cache:
    """The cached latents of one size with their token ids.

    Picks up chunks that are still being written.
    """

    def __init__(self, folder: Path, size: int, tokenizer: CLIPTokenizer) -> None:
        self.folder, self.size, self.tokenizer = folder, size, tokenizer
        self.files: list[Path] = []
        self.latents, self.ids = [], []
        self.refresh()

    def refresh(self) -> None:
        for file in sorted(self.folder.glob(f"latents_{self.size}_*.pt")):
            if file not in self.files:
                chunk = torch.load(file)
                self.files.append(file)
                self.latents.append(chunk["latents"])
                self.ids.append(token_ids(self.tokenizer, chunk["captions"]))

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return (count, 16, h, w) float32 latents and (count, 77) token ids, with replacement."""
        picks = [
            divmod(i, CHUNK) for i in torch.randint(len(self.files) * CHUNK, (count,)).tolist()
        ]
        latents = torch.stack([self.latents[chunk][row] for chunk, row in picks]).float()
        return latents.contiguous(memory_format=torch.channels_last), torch.stack(
            [self.ids[chunk][row] for chunk, row in picks]
        )


def signal_and_noise() -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar), each (1000,), of the saved scheduler.

    It has zero terminal SNR.
    """
    alphas = make_scheduler().alphas_cumprod.clone()
    alphas[-1] = 0.0  # the scheduler keeps a tiny value there for its own division
    return alphas.sqrt(), (1 - alphas).sqrt()


def channel_weights() -> Tensor:
    """Return the loss weights of the DC, first- and second-order coefficients: (1, 16, 1, 1),
    mean 1.
    """
    weights = torch.tensor([2.0] * 3 + [1.2] * 6 + [0.8] * 7)[None, :, None, None]
    return weights / weights.mean()


class UnetTraining:
    """Model, averaged model, optimizer and counters, saved and restored as one file."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.state_file = plan, plan.folder / "unet_state.pt"
        self.tokenizer = load_tokenizer(plan.start) if plan.start else train_tokenizer()
        self.net = TextToLatents(len(self.tokenizer))
        if plan.start:
            start_from(self.net, plan.start)
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.parameters, self.averages = (
            list(self.net.parameters()),
            list(self.average.parameters()),
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.signal, self.noise = signal_and_noise()
        self.weights = channel_weights()
        self.empty_ids = token_ids(self.tokenizer, [""])
        self.step, self.spent = 0, {128: 0.0, 256: 0.0}
        self.samples = {128: 0, 256: 0}
        if self.state_file.exists():
            self.restore()

    def restore(self) -> None:
        state = torch.load(self.state_file)
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent, self.samples = state["step"], state["spent"], state["samples"]
        torch.manual_seed(self.plan.seed + self.step)

    def save(self) -> None:
        """Write the whole state, then replace the old one atomically, so a killed run keeps a
        good state.
        """
        counters = {"step": self.step, "spent": self.spent, "samples": self.samples}
        models = {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(models | counters, self.state_file.with_suffix(".part"))
        self.tokenizer.save_pretrained(self.plan.folder / "tokenizer")
        self.state_file.with_suffix(".part").replace(self.state_file)

    @property
    def progress(self) -> float:
        return sum(self.spent.values()) / self.plan.seconds

    def next_size(self) -> int:
        """Return the image size that is most behind its share of the time."""
        return 256 if self.spent[256] < self.plan.large_share * sum(self.spent.values()) else 128

    def learning_rate(self) -> float:
        return (
            LEARNING_RATE
            * min(1, (self.step + 1) / WARM_UP_STEPS)
            * (0.5 + 0.5 * math.cos(math.pi * min(1, self.progress)))
            + 1e-5
        )

    def loss(self, latents: Tensor, ids: Tensor, pixels: int) -> Tensor:
        """Return the weighted v-prediction error.

        For guidance, 5 % of captions are empty and 7 % of embeddings zero.
        """
        count = len(latents)
        chance = torch.rand(count)
        ids = torch.where((chance < 0.05)[:, None], self.empty_ids, ids)
        embeds, pooled = self.net.encode(ids)
        kept = (chance < 0.93).float()
        embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
        spread = (torch.arange(count) + torch.rand(count)) / count  # stratified over the batch
        timestep = (1000 * spread ** NOISE_BIAS[pixels]).long().clamp(0, 999)
        signal, noise = (
            self.signal[timestep][:, None, None, None],
            self.noise[timestep][:, None, None, None],
        )
        epsilon = torch.randn_like(latents)
        guess = self.net(signal * latents + noise * epsilon, timestep, embeds, pooled, pixels)
        return ((guess - (signal * epsilon - noise * latents)).pow(2) * self.weights).mean()

    def update(self, cache: Cache) -> float:
        """Run one optimizer step on a batch of this cache's size and return the loss."""
        batch = BATCH[cache.size]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss(*cache.sample(batch), cache.size)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.step += 1
        self.samples[cache.size] += batch
        decay = min(AVERAGE_DECAY, (1 + self.step) / (12 + self.step))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        return loss.item()


@torch.no_grad()
def sample(
    training: UnetTraining, captions: list[str], *, pixels: int, steps: int = 12, seed: int = 0
) -> Tensor:
    """Sample (B, 16, h, w) latents from the averaged model: DDIM with guidance, no VAE, no
    pipeline.
    """
    embeds, pooled = training.average.encode(token_ids(training.tokenizer, captions))
    embeds, pooled = (
        torch.cat([torch.zeros_like(embeds), embeds]),
        torch.cat([torch.zeros_like(pooled), pooled]),
    )
    noise = torch.randn(
        len(captions), 16, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(seed)
    )
    latents = noise.contiguous(memory_format=torch.channels_last)
    timesteps = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        both = training.average(
            torch.cat([latents, latents]),
            torch.full((2 * len(captions),), now),
            embeds,
            pooled,
            pixels,
        )
        without, guided = both.chunk(2)
        v = without + GUIDANCE * (guided - without)
        clean = training.signal[now] * latents - training.noise[now] * v
        epsilon = training.signal[now] * v + training.noise[now] * latents
        latents = (
            clean
            if after is None
            else training.signal[after] * clean + training.noise[after] * epsilon
        )
    return latents


def validate(training: UnetTraining, *, pixels: int, count: int = 20) -> dict[str, float]:
    """Return the judge's measures on held-out captions, decoded by the linear inverse.

    They differ from the evaluation set's.
    """
    scenes = held_out_scenes(count, seed=VALIDATION_SEED)
    images = to_uint8(
        to_pixels(sample(training, [scene.caption for scene in scenes], pixels=pixels))
    )
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return {
        measure: round(sum(verdict[measure] for verdict in verdicts) / count, 3)
        for measure in MEASURES
    }


def train_unet(plan: Plan) -> None:
    """Train until `plan.seconds` of wall time have passed, including earlier runs of this state."""
    training = UnetTraining(plan)
    random.seed(plan.seed)
    sizes = (128, 256) if plan.large_share else (128,)
    caches = {size: Cache(plan.folder, size, training.tokenizer) for size in sizes}
    losses: dict[int, list[float]] = {size: [] for size in caches}
    last = saved = evaluated = time.monotonic()
    while training.progress < 1:
        size = training.next_size()
        losses[size].append(training.update(caches[size]))
        now = time.monotonic()
        training.spent[size] += now - last
        last = now
        if now - saved > SAVE_EVERY_S:
            saved = now
            training.save()
            for cache in caches.values():
                cache.refresh()
            recent = {
                size: round(float(np.mean(values[-100:])), 4)
                for size, values in losses.items()
                if values
            }
            logger.info(
                "step %d, %.1f %%, samples %s, loss %s",
                training.step,
                100 * training.progress,
                training.samples,
                recent,
            )
        if now - evaluated > EVALUATE_EVERY_S:
            evaluated = now
            for size in caches:
                logger.info(
                    "step %d, %d px, %s", training.step, size, validate(training, pixels=size)
                )
    training.save()
