"""What a step of xdit costs: Ulysses, ring and PipeFusion. Imports no torch."""

from backends.autotune.cost import MethodCost, RankWork
from backends.plan import ParallelPlan

ULYSSES_LOSS = 1.26
RING_LOSS = 1.22
STAGE_LOSS = 1.25
"""Patches are thin matrices, which multiply slower."""


def cost(plan: ParallelPlan, part: RankWork) -> MethodCost:
    """The sequence is split within each stage."""
    sequence = _sequence(plan, part)
    return _stages(plan, part, sequence) if plan.degree("stage") > 1 else sequence


def _sequence(plan: ParallelPlan, part: RankWork) -> MethodCost:
    """Ulysses (arXiv:2309.14509, section 3): two exchanges in each attention, waited for. Ring
    (arXiv:2310.01889): sent while it computes.
    """
    ulysses, ring, work = plan.degree("ulysses"), plan.degree("ring"), part.work
    ranks = ulysses * ring
    loss = (ULYSSES_LOSS if ulysses > 1 else 1.0) * (RING_LOSS if ring > 1 else 1.0)
    computing = part.compute_s * loss / ranks
    kv_bytes = part.of(work.kv_bytes) / ranks
    # queries, keys, values and the result: twice the keys and values
    traded = 2 * kv_bytes * (ulysses - 1) / ulysses
    passed = kv_bytes * (ring - 1)
    waited = part.link.seconds(traded, 2 * work.num_attentions) if ulysses > 1 else 0.0
    shown = part.shown(passed, (ring - 1) * work.num_attentions, computing) if ring > 1 else 0.0
    gathered = part.of(work.latent_bytes) / ranks if ranks > 1 else 0.0
    return MethodCost(
        step_s=computing + waited + shown + (part.link.seconds(gathered, 1) if ranks > 1 else 0.0),
        sent_bytes=traded + passed + gathered,
        activations=1 / ranks,
    )


def _stages(plan: ParallelPlan, part: RankWork, inner: MethodCost) -> MethodCost:
    """PipeFusion, arXiv:2405.14430, section 4, as docs/xdit.md describes it.

    Stages wait for each other between steps only where patches are too few, or where a data axis
    needs whole predictions.
    """
    stages, work = plan.degree("stage"), part.work
    halves = 2 if work.halves == 2 and plan.degree("cfg") == 1 else 1
    patches = int(str(plan.options["num_pipeline_patch"]))
    turns = halves * patches
    filling = (
        turns + stages - 1 if plan.degree("data") > 1 else max(turns, stages + halves - 1)
    ) / turns
    computing = inner.step_s / stages * filling * STAGE_LOSS
    sent = part.of(work.hidden_bytes + work.latent_bytes)
    whole = (halves + stages - 1) / halves / stages
    return MethodCost(
        step_s=computing + part.shown(sent, 2 * turns, computing),
        sent_bytes=sent + inner.sent_bytes / stages,
        synchronous_s=inner.step_s * whole,
        num_synchronous=int(str(plan.options["warmup_steps"])),
        kept_weights=1 / stages,
        activations=inner.activations,
        buffer_bytes=part.of(work.kv_bytes) / stages,
    )
