"""Predicts seconds per step and bytes per rank of a plan. Imports no torch.

Inputs are one rank's step, measured (step_profile.py) or estimated (estimate.py), and the link
between ranks. The division of that step among ranks follows the papers' schedules. Losses come from
the measured constants in this file and in backends/<name>/cost.py. Used by `--backend=auto`
(hosts/launch/auto_backend.py), benchmarks/planner.py and benchmarks/simulate.py; docs/planner.md
says how accurate it is.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from backends import plan_module
from backends.plan import ParallelPlan
from backends.step_cache_spec import StepCacheSpec

CFG_LOSS = 1.10
"""Step time on half of the batch, relative to half of a full step. The losses of the methods
(backends/<name>/cost.py) are relative to an even division, too, without communication. All were
measured with two CPU ranks of one thread and lie between the values for small latents (16 to 32)
and for 64 (docs/planner.md).
"""

SIZED_BYTES = (
    "activation_bytes", "latent_bytes", "kv_bytes", "hidden_bytes", "halo_bytes", "skip_bytes",
)  # fmt: skip
"""Fields of Work that grow with the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Work of one sampling step on one rank.

    Bytes are in the compute dtype, for whole images and both halves of guidance.
    """

    step_s: float
    halves: int  # predictions per step: 2 with guidance
    weight_bytes: int  # denoiser
    other_bytes: int  # all other components
    encoder_bytes: int = 0  # those of them that are text encoders
    activation_bytes: int  # peak during a step
    latent_bytes: int  # prediction
    kv_bytes: int  # keys and values of all self-attention layers
    hidden_bytes: int  # hidden states between blocks
    num_attentions: int
    halo_bytes: int = 0  # rows that convolutions read beyond the border of a patch
    skip_bytes: int = 0  # skip connections of a UNet
    num_convolutions: int = 0
    num_norms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The connection between ranks."""

    latency_s: float
    bytes_per_s: float
    # Fraction of a message's time that overlaps with computing. On CPUs both share the cores.
    hides: float = 1.0
    communicator_bytes: int = 0  # device memory that NCCL takes for one communicator

    def seconds(self, num_bytes: float, messages: float) -> float:
        return messages * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted cost of one plan."""

    step_s: float  # a step after the synchronous ones
    synchronous_s: float  # a synchronous step
    num_synchronous: int
    sent_bytes: float  # by one rank in a step
    run_bytes: float  # memory of one rank
    load_bytes: float  # memory of one rank while it loads, with all weights

    @property
    def memory_bytes(self) -> float:
        return max(self.run_bytes, self.load_bytes)

    def image_s(self, num_steps: int, *, step_s: float | None = None) -> float:
        """Return the seconds of all steps of an image, without text encoders and VAE.

        step_s: replaces the predicted seconds of a step.
        """
        synchronous = min(self.num_synchronous, num_steps)
        return synchronous * self.synchronous_s + (num_steps - synchronous) * (
            self.step_s if step_s is None else step_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """Work of one rank after the CFG split, before the method divides it."""

    compute_s: float  # seconds of one pass over the image
    fraction: float  # of the batch: 0.5 with a CFG split
    work: Work
    link: Link

    def of(self, num_bytes: float) -> float:
        """Return the bytes of this rank's fraction of the batch."""
        return self.fraction * num_bytes

    def shown(self, num_bytes: float, messages: float, compute_s: float) -> float:
        """Return the seconds that background messages add to a step.

        compute_s: seconds of computing that can hide them.
        """
        needed = self.link.seconds(num_bytes, messages)
        hidden = min(needed * self.link.hides, compute_s)
        return needed - hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCost:
    """Cost of a step for one rank under a method, within one half of the CFG split."""

    step_s: float
    sent_bytes: float = 0.0
    synchronous_s: float | None = None  # a synchronous step; None: like any other
    num_synchronous: int = 0
    kept_weights: float = 1.0  # fraction of the denoiser's weights that a rank keeps
    activations: float = 1.0  # fraction of the activations
    buffer_bytes: float = 0.0  # stored values of the previous step


def num_communicators(plan: ParallelPlan, *, is_sharded: bool = False) -> int:
    """Return the largest number of NCCL communicators that a rank of this plan opens: one for each
    group of ranks, and one for each pair of ranks that send to each other outside of collectives
    (groups/links.py).
    """
    split = [name for name, degree in plan.axes if degree > 1]
    halves, stages, segments = (plan.degree(name) for name in ("cfg", "stage", "segment"))
    groups = 2 ** len(split) - 1  # every combination of axes
    if "patch" in split and plan.reads_previous_step:
        groups += 2 ** (len(split) - 1)  # each with patches has a second group
    pairs = segments - 1
    if stages > 1:
        groups += 1  # for predictions that are sent backwards
        # the last stage's: with the one before it, and with all that get its predictions
        pairs += 1 + halves * (stages - 1)
    return groups + pairs + (is_sharded and plan.world_size > 1)


def divided_bytes(work: Work, num_ranks: int) -> float:
    """Return the bytes of weights on a rank that has a share of them, and two gathered blocks."""
    blocks = max(work.num_attentions, 2)
    return (work.weight_bytes + work.other_bytes) / num_ranks + 2 * work.weight_bytes / blocks


def predict(plan: ParallelPlan, work: Work, link: Link, *, is_sharded: bool = False) -> Estimate:
    """Return the predicted cost of a plan.

    Axes multiply: the CFG split first, then the method within each half. is_sharded: whether the
    ranks divide the weights and gather each block's.
    """
    cfg = plan.degree("cfg")
    is_split = cfg == 2 and work.halves == 2
    fraction = 0.5 if is_split else 1.0
    part = RankWork(
        compute_s=work.step_s * fraction * (CFG_LOSS if is_split else 1.0),
        fraction=fraction,
        work=work,
        link=link,
    )
    cost = plan_module(plan.method).cost(plan, part)
    gathered_bytes = work.latent_bytes / 2 if cfg == 2 else 0.0
    gathering_s = link.seconds(gathered_bytes, 1) if cfg == 2 else 0.0
    run_bytes = (
        work.weight_bytes * cost.kept_weights
        + work.other_bytes
        + work.activation_bytes * fraction * cost.activations
        + cost.buffer_bytes
        + num_communicators(plan, is_sharded=is_sharded) * link.communicator_bytes
    )
    load_bytes = work.weight_bytes + work.other_bytes
    if is_sharded:
        whole = work.weight_bytes * cost.kept_weights + work.other_bytes
        run_bytes += divided_bytes(work, plan.world_size) - whole
        load_bytes = round(divided_bytes(work, plan.world_size))
        sent = work.weight_bytes * (plan.world_size - 1) / plan.world_size
        gathering_s += part.shown(sent, max(work.num_attentions, 2), cost.step_s)
    return Estimate(
        step_s=cost.step_s + gathering_s,
        synchronous_s=(cost.step_s if cost.synchronous_s is None else cost.synchronous_s)
        + gathering_s,
        num_synchronous=cost.num_synchronous,
        sent_bytes=cost.sent_bytes + gathered_bytes,
        run_bytes=run_bytes,
        load_bytes=load_bytes,
    )


SKIPPED_SHARE = {"deep": 0.35, "taylor": 0.15, "first_block": 0.15, "prediction": 0.02}
"""Kind of step cache -> the time of a skipped step, as a share of that of a full one: a UNet's
outermost level, a transformer's first block and what surrounds it, the sampler alone. Estimated
from their parts, not measured: `measure` times the candidates themselves.
"""


def with_cache(estimate: Estimate, cache: StepCacheSpec) -> Estimate:
    """Return the estimate with the means of full and skipped steps."""
    every = cache.value if cache.kind != "first_block" else 2
    share = (1 + (every - 1) * SKIPPED_SHARE[cache.kind]) / every
    return replace(
        estimate,
        step_s=estimate.step_s * share,
        synchronous_s=estimate.synchronous_s * share,
        sent_bytes=estimate.sent_bytes * share,
    )


def resized(work: Work, *, pixels: float, halves: int) -> Work:
    """Return the work of a step of another size, or with another number of guidance halves.

    pixels: relative to `work`. In proportion, which underestimates attention in larger images.
    """
    share = pixels * halves / work.halves
    divided = {
        item.name: round(getattr(work, item.name) * share)
        for item in fields(work)
        if item.name in SIZED_BYTES
    }
    return replace(work, step_s=work.step_s * share, halves=halves, **divided)


def as_json(record: Work | Link) -> dict[str, Any]:
    """Return field -> value for the cache. `Work(**...)` reads it back."""
    return {item.name: getattr(record, item.name) for item in fields(record)}
