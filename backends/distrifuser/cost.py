"""What a step of DistriFuser costs: DistriFusion, arXiv:2402.19481, section 4. Imports no torch."""

from backends.autotune.cost import MethodCost, RankWork
from backends.plan import ParallelPlan

PATCH_LOSS = 1.26
FULL_SYNC_LOSS = 1.50
"""Ranks stop for each other at every convolution, norm and attention, and each time wait for the
slower one.
"""
PACKED_MESSAGES = 8
"""Messages of a displaced step, whatever the model (docs/distrifuser.md)."""


def cost(plan: ParallelPlan, part: RankWork) -> MethodCost:
    """Each rank sends its keys, values and border rows to all others."""
    ranks, work = plan.degree("patch"), part.work
    if ranks == 1:
        return MethodCost(step_s=part.compute_s)
    sent = part.of(work.kv_bytes / ranks + work.halo_bytes) * (ranks - 1)
    computing = part.compute_s * FULL_SYNC_LOSS / ranks
    stops = work.num_attentions + work.num_convolutions + work.num_norms
    synchronous_s = computing + part.link.seconds(sent, stops)
    if plan.options["sync_mode"] == "full_sync":
        return MethodCost(
            step_s=synchronous_s,
            synchronous_s=synchronous_s,
            sent_bytes=sent,
            activations=1 / ranks,
        )
    computing = part.compute_s * PATCH_LOSS / ranks
    return MethodCost(
        step_s=computing + part.shown(sent, PACKED_MESSAGES, computing),
        synchronous_s=synchronous_s,
        num_synchronous=int(str(plan.options["warmup_steps"])),
        sent_bytes=sent,
        activations=1 / ranks,
        # the others' values of the previous step, and those that extrapolate them
        buffer_bytes=2 * part.of(work.kv_bytes),
    )
