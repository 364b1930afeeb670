"""Seconds per step and bytes per rank of a plan, predicted from one rank's step and the link
between ranks. Imports no torch.

Used by `--backend=auto` (hosts/launch/auto_backend.py) and by benchmarks/planner.py and
benchmarks/simulate.py. docs/planner.md says how far to trust it. What one rank's step does is
measured (backends/autotune/step_profile.py) or estimated (backends/autotune/estimate.py); how the
methods divide it is arithmetic over the papers' schedules; what they lose beside it are the
constants below, taken from measurements.
"""

from dataclasses import dataclass, fields
from typing import Any

from backends import plan_module
from backends.plan import ParallelPlan

CFG_LOSS = 1.10
"""A step on half of the batch, over half of a step. Those of the methods (backends/<name>/cost.py)
are likewise over the even part, without what is sent; all were measured with two CPU ranks of one
thread, and lie between those of small latents (16 to 32) and of 64 (docs/planner.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one sampling step does on one rank. Bytes are of whole images and of both halves of
    guidance, in the compute type.
    """

    step_s: float
    halves: int  # 2 where guidance makes two predictions
    weight_bytes: int  # of the denoiser
    other_bytes: int  # of all else that is loaded
    activation_bytes: int  # at the peak of a step
    latent_bytes: int  # of the prediction
    kv_bytes: int  # keys and values of all self-attentions
    hidden_bytes: int  # what passes from block to block
    num_attentions: int
    halo_bytes: int = 0  # rows that the convolutions see beyond the border of a patch
    skip_bytes: int = 0  # what a UNet keeps for its way up
    num_convolutions: int = 0
    num_norms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The connection between ranks."""

    latency_s: float
    bytes_per_s: float
    # Part of a message's time that computing hides; ranks on CPUs share cores with what sends.
    hides: float = 1.0

    def seconds(self, num_bytes: float, messages: float) -> float:
        return messages * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one plan is predicted to cost."""

    step_s: float  # a step after the synchronous ones
    synchronous_s: float  # one of those
    num_synchronous: int
    sent_bytes: float  # by one rank in a step
    run_bytes: float  # memory of one rank
    load_bytes: float  # the same while it loads, with all weights

    @property
    def memory_bytes(self) -> float:
        return max(self.run_bytes, self.load_bytes)

    def image_s(self, num_steps: int, *, step_s: float | None = None) -> float:
        """Seconds of all steps of an image; without text encoders and decoder. step_s: in place of
        the predicted one.
        """
        synchronous = min(self.num_synchronous, num_steps)
        return synchronous * self.synchronous_s + (num_steps - synchronous) * (
            self.step_s if step_s is None else step_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWork:
    """The work of one rank after the CFG split, before the method divides it."""

    compute_s: float  # of one pass over the image
    fraction: float  # of the batch: 0.5 where the CFG split takes one half away
    work: Work
    link: Link

    def of(self, num_bytes: float) -> float:
        """Return the bytes of this rank's part of the batch."""
        return self.fraction * num_bytes

    def shown(self, num_bytes: float, messages: float, compute_s: float) -> float:
        """Seconds by which messages sent in the background lengthen a step that computes for so
        long.
        """
        needed = self.link.seconds(num_bytes, messages)
        hidden = min(needed * self.link.hides, compute_s)
        return needed - hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCost:
    """What a step costs one rank by a method, within one half of the CFG split."""

    step_s: float
    sent_bytes: float = 0.0
    synchronous_s: float | None = None  # a synchronous step; None: as any other
    num_synchronous: int = 0
    kept_weights: float = 1.0  # part of the denoiser's weights
    activations: float = 1.0  # part of the activations
    buffer_bytes: float = 0.0  # values of the previous step


def predict(plan: ParallelPlan, work: Work, link: Link) -> Estimate:
    """What a step of the plan will take. Axes multiply: the CFG split first, the method within each
    half.
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
    )
    return Estimate(
        step_s=cost.step_s + gathering_s,
        synchronous_s=(cost.step_s if cost.synchronous_s is None else cost.synchronous_s)
        + gathering_s,
        num_synchronous=cost.num_synchronous,
        sent_bytes=cost.sent_bytes + gathered_bytes,
        run_bytes=run_bytes,
        load_bytes=work.weight_bytes + work.other_bytes,
    )


def as_json(record: Work | Link) -> dict[str, Any]:
    """Field -> value, as the cache keeps it; `Work(**...)` reads it back."""
    return {item.name: getattr(record, item.name) for item in fields(record)}
