"""What a step of AsyncDiff costs: arXiv:2406.06911, section 3. Imports no torch."""

from backends.autotune.cost import MethodCost, RankWork
from backends.plan import ParallelPlan

SEGMENT_LOSS = 1.07


def cost(plan: ParallelPlan, part: RankWork) -> MethodCost:
    """A turn computes one segment on each rank; with stride 2 it makes two steps."""
    if plan.degree("segment") == 1:
        return MethodCost(step_s=part.compute_s)
    segments, stride = int(str(plan.options["model_n"])), int(str(plan.options["stride"]))
    work = part.work
    computing = part.compute_s * SEGMENT_LOSS / segments / stride
    sent = part.of(work.hidden_bytes + work.skip_bytes + work.latent_bytes * stride) / stride
    return MethodCost(
        step_s=computing + part.shown(sent, 2 / stride, computing),
        sent_bytes=sent,
        synchronous_s=part.compute_s,
        num_synchronous=int(str(plan.options["warmup_steps"])),
        kept_weights=1 / segments if plan.splits_weights_by else 1.0,
        buffer_bytes=3 * part.of(work.hidden_bytes + work.skip_bytes),
    )
