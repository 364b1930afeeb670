"""--mode: whether the ranks may split into teams with a job each, and with which plans. Imports no
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from backends import planner
from backends.errors import ConfigError, HostError
from backends.generation.batching import why_alone
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan
from backends.request import LoadRequest

Mode = Literal["latency", "throughput", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teams:
    """How the ranks may split."""

    mode: Mode = "latency"
    plans: Mapping[int, ParallelPlan] = field(default_factory=dict)
    """Team size -> the plan of such a team, without the plan of all ranks together."""
    reasons: tuple[str, ...] = ()
    """Why the mode was chosen."""

    def facts(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "teams": {str(size): plan.describe() for size, plan in self.plans.items()},
        }


def choose_teams(
    asked: Mode,
    spec: ModelSpec,
    plan: ParallelPlan,
    options: Mapping[str, object],
    *,
    features: tuple[str, ...],
    load: LoadRequest,
    chosen: Mapping[int, ParallelPlan] | None = None,
    fastest: int | None = None,
) -> Teams:
    """Return the mode with the plans of its teams, or `latency` with the reason if `auto` has no
    other choice. ConfigError for `throughput` where it is not available.

    plan: of all ranks. features: of the model table, which the launch needs. chosen: team size ->
    its plan, by --backend=auto. fastest: the number of ranks that finish one image soonest.
    """
    if plan.world_size == 1:
        return Teams()
    if asked == "latency":
        return Teams(reasons=("mode=latency: all ranks work on each job, as requested",))
    if problem := _problem(spec, plan, features, load):
        if asked == "throughput":
            raise ConfigError(
                f"--mode=throughput is not available: {problem}. Leave out one of the two."
            )
        return Teams(reasons=(f"mode=latency: {problem}",))
    if asked == "throughput":
        return Teams(mode="throughput", plans={1: planner("single")(spec, options, 1)})
    if chosen is None:
        chosen = {
            size: found
            for size in _team_sizes(plan.world_size)
            if (found := _team_plan(spec, plan, options, size)) is not None
        }
    if fastest in chosen and fastest != plan.world_size:
        why = (
            f"mode=throughput: more than {fastest} of {plan.world_size} ranks are slower, so "
            f"they work in teams of {fastest}"
        )
        return Teams(mode="throughput", plans={fastest: chosen[fastest]}, reasons=(why,))
    return Teams(mode="auto", plans=chosen)


def batch_limit(
    most: int, asked: Mode, spec: ModelSpec, plan: ParallelPlan, teams: Teams, load: LoadRequest
) -> tuple[int, str]:
    """Return the largest batch of one rank, `most` at most, and the reason if it is 1."""
    reason = why_alone(spec, load)
    if asked == "latency":
        reason = "mode=latency: each image is the same whatever the load"
    elif plan.world_size > 1 and 1 not in teams.plans:
        reason = "no rank works alone"
    return (1, f"max_batch=1: {reason}") if most > 1 and reason else (most, "")


def _problem(
    spec: ModelSpec, plan: ParallelPlan, features: tuple[str, ...], load: LoadRequest
) -> str:
    """Return why ranks cannot change teams between jobs; empty if they can."""
    if setting := plan.splits_weights_by:
        return f"with {setting} each rank holds only a part of the weights"
    if load.divided:
        return "with --shard each rank holds only a part of the weights"
    if load.encoder_placement != "every":
        return "with --encoder_placement not every rank has the text encoders"
    if load.compile is not None:
        return (
            "compiled models would be compiled again whenever ranks split or rejoin "
            "(--compile_unet, --compile_vae, --compile_text_encoder)"
        )
    try:
        for feature in ("", *features):
            spec.require("single", *[feature] if feature else [])
    except HostError as error:
        return f"one rank alone cannot run it: {error}".rstrip(".")
    return ""


def _team_sizes(world_size: int) -> list[int]:
    return [size for size in range(1, world_size) if world_size % size == 0]


def _team_plan(
    spec: ModelSpec, plan: ParallelPlan, options: Mapping[str, object], size: int
) -> ParallelPlan | None:
    """None if the options for all ranks do not fit fewer."""
    try:
        return planner("single" if size == 1 else plan.method)(spec, options, size)
    except HostError:
        return None
