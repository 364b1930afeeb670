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

from backends.plan import ParallelPlan

CFG_LOSS = 1.10
"""A step on half of the batch, over half of a step. The losses below are likewise over the even
share, without what is sent; all were measured with two CPU ranks of one thread, and lie between
those of small latents (16 to 32) and of 64 (docs/planner.md)."""
PATCH_LOSS = 1.26
FULL_SYNC_LOSS = 1.50
"""Ranks stop for each other at every convolution, norm and attention, and each time wait for the
slower one.
"""
SEGMENT_LOSS = 1.07
ULYSSES_LOSS = 1.26
RING_LOSS = 1.22
STAGE_LOSS = 1.25
"""Patches are thin matrices, which multiply slower."""
PACKED_MESSAGES = 8
"""Messages of a displaced step of distrifuser, whatever the model (docs/distrifuser.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one sampling step does on one rank. Bytes are of whole images and of both halves of
    guidance, in the compute type.

    halves: 2 where guidance makes two predictions. kv_bytes: keys and values of all
    self-attentions. halo_bytes: rows that the convolutions see beyond the border of a patch.
    skip_bytes: what a UNet keeps for its way up. hidden_bytes: what passes from block to block.
    latent_bytes: the prediction. weight_bytes: of the denoiser; other_bytes: of all else that is
    loaded.
    """

    step_s: float
    halves: int
    weight_bytes: int
    other_bytes: int
    activation_bytes: int
    latent_bytes: int
    kv_bytes: int
    hidden_bytes: int
    num_attentions: int
    halo_bytes: int = 0
    skip_bytes: int = 0
    num_convolutions: int = 0
    num_norms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between ranks. hides: share of the computing time behind which messages can be sent; ranks on
    CPUs share cores with what sends.
    """

    latency_s: float
    bytes_per_s: float
    hides: float = 1.0

    def seconds(self, num_bytes: float, messages: float) -> float:
        return messages * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of one plan. step_s: a step after the synchronous ones, of which there are `num_synchronous`
    of `synchronous_s` each.

    sent_bytes: by one rank in a step. run_bytes: memory of one rank; load_bytes: while it loads,
    when it still has all weights.
    """

    step_s: float
    synchronous_s: float
    num_synchronous: int
    sent_bytes: float
    run_bytes: float
    load_bytes: float

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
class _Share:
    """One rank's part, after the CFG split. compute_s: of one pass over the image; the others as in
    Work.
    """

    compute_s: float
    fraction: float
    work: Work
    link: Link

    def of(self, num_bytes: float) -> float:
        return self.fraction * num_bytes

    def shown(self, num_bytes: float, messages: float, compute_s: float) -> float:
        """Seconds by which messages sent in the background lengthen a step that computes for so
        long.
        """
        needed = self.link.seconds(num_bytes, messages)
        hidden = min(needed * self.link.hides, compute_s)
        return needed - hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    step_s: float
    sent_bytes: float = 0.0
    synchronous_s: float | None = None
    num_synchronous: int = 0
    kept_weights: float = 1.0
    activations: float = 1.0
    buffer_bytes: float = 0.0


def predict(plan: ParallelPlan, work: Work, link: Link) -> Estimate:
    """What a step of the plan will take. Axes multiply: the CFG split first, the method within each
    half.
    """
    cfg = plan.degree("cfg")
    is_split = cfg == 2 and work.halves == 2
    fraction = 0.5 if is_split else 1.0
    share = _Share(
        compute_s=work.step_s * fraction * (CFG_LOSS if is_split else 1.0),
        fraction=fraction,
        work=work,
        link=link,
    )
    cost = _method_cost(plan, share)
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


def _method_cost(plan: ParallelPlan, share: _Share) -> _Cost:
    if plan.degree("patch") > 1:
        return _patches(plan, share)
    if plan.degree("segment") > 1:
        return _segments(plan, share)
    if plan.degree("stage") > 1:
        return _stages(plan, share, _sequence(plan, share))
    return _sequence(plan, share)


def _patches(plan: ParallelPlan, share: _Share) -> _Cost:
    """DistriFusion, arXiv:2402.19481, section 4: each rank sends its keys, values and border rows
    to all others.
    """
    ranks, work = plan.degree("patch"), share.work
    sent = share.of(work.kv_bytes / ranks + work.halo_bytes) * (ranks - 1)
    computing = share.compute_s * FULL_SYNC_LOSS / ranks
    stops = work.num_attentions + work.num_convolutions + work.num_norms
    synchronous_s = computing + share.link.seconds(sent, stops)
    shared = {"sent_bytes": sent, "activations": 1 / ranks, "synchronous_s": synchronous_s}
    if plan.options.get("sync_mode") == "full_sync":
        return _Cost(step_s=synchronous_s, **shared)
    computing = share.compute_s * PATCH_LOSS / ranks
    return _Cost(
        step_s=computing + share.shown(sent, PACKED_MESSAGES, computing),
        num_synchronous=_warmup(plan),
        buffer_bytes=2
        * share.of(
            work.kv_bytes
        ),  # values of the step before, of the others, and what extrapolates them
        **shared,
    )


def _segments(plan: ParallelPlan, share: _Share) -> _Cost:
    """AsyncDiff, arXiv:2406.06911, section 3: a turn computes one segment on each rank; with stride
    2 it makes two steps.
    """
    segments, stride, work = (
        int(str(plan.options["model_n"])),
        int(str(plan.options["stride"])),
        share.work,
    )
    is_sharded = bool(plan.options.get("shard_weights"))
    computing = share.compute_s * SEGMENT_LOSS / segments / stride
    sent = share.of(work.hidden_bytes + work.skip_bytes + work.latent_bytes * stride) / stride
    return _Cost(
        step_s=computing + share.shown(sent, 2 / stride, computing),
        sent_bytes=sent,
        synchronous_s=share.compute_s,
        num_synchronous=_warmup(plan),
        kept_weights=1 / segments if is_sharded else 1.0,
        buffer_bytes=3 * share.of(work.hidden_bytes + work.skip_bytes),
    )


def _sequence(plan: ParallelPlan, share: _Share) -> _Cost:
    """Ulysses (arXiv:2309.14509, section 3): two exchanges in each attention, waited for. Ring
    (arXiv:2310.01889): while it computes.
    """
    ulysses, ring, work = plan.degree("ulysses"), plan.degree("ring"), share.work
    ranks = ulysses * ring
    loss = (ULYSSES_LOSS if ulysses > 1 else 1.0) * (RING_LOSS if ring > 1 else 1.0)
    computing = share.compute_s * loss / ranks
    kv_bytes = share.of(work.kv_bytes) / ranks
    traded = (
        2 * kv_bytes * (ulysses - 1) / ulysses
    )  # queries, keys, values and the result: twice the keys and values
    passed = kv_bytes * (ring - 1)
    waited = share.link.seconds(traded, 2 * work.num_attentions) if ulysses > 1 else 0.0
    shown = share.shown(passed, (ring - 1) * work.num_attentions, computing) if ring > 1 else 0.0
    gathered = share.of(work.latent_bytes) / ranks if ranks > 1 else 0.0
    return _Cost(
        step_s=computing + waited + shown + (share.link.seconds(gathered, 1) if ranks > 1 else 0.0),
        sent_bytes=traded + passed + gathered,
        activations=1 / ranks,
    )


def _stages(plan: ParallelPlan, share: _Share, inner: _Cost) -> _Cost:
    """PipeFusion, arXiv:2405.14430, section 4, as docs/xdit.md describes it.

    Stages wait for each other between steps only where patches are too few, or where a data axis
    wants whole predictions.
    """
    stages, work = plan.degree("stage"), share.work
    halves = 2 if work.halves == 2 and plan.degree("cfg") == 1 else 1
    patches = int(str(plan.options["num_pipeline_patch"]))
    turns = halves * patches
    filling = (
        turns + stages - 1 if plan.degree("data") > 1 else max(turns, stages + halves - 1)
    ) / turns
    computing = inner.step_s / stages * filling * STAGE_LOSS
    sent = share.of(work.hidden_bytes + work.latent_bytes)
    whole = (halves + stages - 1) / halves / stages
    return _Cost(
        step_s=computing + share.shown(sent, 2 * turns, computing),
        sent_bytes=sent + inner.sent_bytes / stages,
        synchronous_s=inner.step_s * whole,
        num_synchronous=_warmup(plan),
        kept_weights=1 / stages,
        activations=inner.activations,
        buffer_bytes=share.of(work.kv_bytes) / stages,
    )


def _warmup(plan: ParallelPlan) -> int:
    return int(str(plan.options.get("warmup_steps") or 0))


def as_json(record: Work | Link) -> dict[str, Any]:
    """Field -> value, as the cache keeps it; `Work(**...)` reads it back."""
    return {item.name: getattr(record, item.name) for item in fields(record)}
