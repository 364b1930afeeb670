"""Launch settings -> the plan of DistriFuser: how many ranks for the CFG split and for patches, and
which mode. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from backends.distrifuser.cost import cost
from backends.distrifuser.modes import SYNC_MODES
from backends.distrifuser.options import OPTIONS, PARALLELISMS, READS, SPLIT_SCHEMES
from backends.errors import PlanError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan, cfg_degrees, times

__all__ = ["OPTIONS", "READS", "candidates", "cost", "make_plan"]

DEFAULT_WARMUP_STEPS = 4
CLOSE_MODES = ("corrected_async_gn", "sync_gn")
"""The approximate modes above 45 dB in docs/quality.md. Their values are one step old, whatever the
number of ranks.
"""
READS_PREVIOUS_STEP = (
    "patches that take values of the step before, because a skipped step has none. Use a cache "
    "that skips by number (deep, taylor, prediction) with another --sync_mode than rotate, "
    "--sync_mode=full_sync or the CFG split alone"
)


def make_plan(spec: ModelSpec, options: Mapping[str, object], world_size: int) -> ParallelPlan:
    """CFG split first where the world is even and the type has guidance, patches (or weight shards)
    within each half.

    options: parallelism, sync_mode, split_scheme, no_split_batch, patch_weights, warmup_steps (by
    its older name warm_up_steps), extrapolate; None or absent is unset, others are ignored.
    PlanError if they contradict each other or the number of ranks.
    """
    given = {name: value for name, value in options.items() if value is not None}
    parallelism = _choice("parallelism", given.get("parallelism", "patch"), PARALLELISMS)
    sync_mode = _choice(
        "sync_mode", given.get("sync_mode", "corrected_async_gn"), tuple(SYNC_MODES)
    )
    scheme = _choice("split_scheme", given.get("split_scheme", "row"), SPLIT_SCHEMES)
    old_spelling = given.get("warm_up_steps", DEFAULT_WARMUP_STEPS)
    warmup_steps = _count("warmup_steps", given.get("warmup_steps", old_spelling))
    splits_batch = (
        world_size > 1
        and world_size % 2 == 0
        and spec.guidance == "cfg"
        and not given.get("no_split_batch")
    )
    degree = world_size // 2 if splits_batch else world_size
    weights = (
        _patch_weights(given["patch_weights"]) if "patch_weights" in given else (1.0,) * degree
    )
    if parallelism == "naive_patch" and scheme != "row" and spec.denoiser == "transformer":
        raise PlanError(
            f"split_scheme={scheme} is not available for {spec.name}: a transformer's tokens are "
            "cut in one line. Use row."
        )
    _check_weights(weights, degree, parallelism, sync_mode)
    axis = "tensor" if parallelism == "tensor" else "patch"
    axes = (("cfg", 2), (axis, degree)) if splits_batch else ((axis, degree),)
    return ParallelPlan(
        method="distrifuser",
        axes=axes,
        exactness=_exactness(parallelism, sync_mode, degree),
        is_close=parallelism == "patch" and sync_mode in CLOSE_MODES,
        splits_weights_by="--parallelism=tensor" if axis == "tensor" and degree > 1 else "",
        reads_previous_step=(
            READS_PREVIOUS_STEP
            if axis == "patch" and degree > 1 and SYNC_MODES[sync_mode].reads_previous_step
            else ""
        ),
        follows_step_cache=parallelism == "patch" and not SYNC_MODES[sync_mode].takes_turns,
        intercepts_sdpa=True,
        options={
            "parallelism": parallelism,
            "sync_mode": sync_mode,
            "split_scheme": scheme,
            "patch_weights": weights,
            "warmup_steps": warmup_steps,
            "extrapolate": given.get("extrapolate"),
        },
        reasons=tuple(_reasons(given, splits_batch, world_size, spec)),
    )


def candidates(
    spec: ModelSpec, ranks: int, *, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    """Patches, displaced and synchronous, within each half of guidance or over all ranks."""
    if ranks == 1:
        return
    for cfg in cfg_degrees(ranks, has_halves=is_guided and spec.guidance == "cfg"):
        whole: dict[str, object] = {} if cfg == 2 else {"no_split_batch": True}
        if cfg == ranks:
            yield "cfg 2", whole
            continue
        for sync_mode in ("corrected_async_gn", "full_sync"):
            name = f"{times(cfg=cfg, patch=ranks // cfg)} {sync_mode}"
            yield name, whole | {"sync_mode": sync_mode}
            if sync_mode in CLOSE_MODES:
                # which of the two is closer depends on the weights (docs/quality.md)
                yield (
                    f"{name}, no extrapolation",
                    whole | {"sync_mode": sync_mode, "extrapolate": False},
                )


def _exactness(parallelism: str, sync_mode: str, degree: int) -> Any:
    if degree == 1:
        return "exact"
    return {"tensor": "reordered", "naive_patch": "approximate"}.get(parallelism) or SYNC_MODES[
        sync_mode
    ].exactness


def _check_weights(
    weights: tuple[float, ...], degree: int, parallelism: str, sync_mode: str
) -> None:
    if len(weights) != degree:
        raise PlanError(
            f"patch_weights has {len(weights)} numbers, but each image is cut into {degree} "
            "patches. "
            f"Give {degree}, or change the number of ranks (no_split_batch=true uses all of them "
            "for patches)."
        )
    if len(set(weights)) > 1 and parallelism == "tensor":
        raise PlanError(
            "patch_weights cannot be used with parallelism=tensor: it cuts weights, not patches. "
            "Leave one of them out."
        )
    if len(set(weights)) > 1 and SYNC_MODES[sync_mode].takes_turns and parallelism == "patch":
        raise PlanError(
            f"patch_weights cannot be used with sync_mode={sync_mode}: the ranks take turns in all "
            "patches. Leave one out."
        )


def _reasons(
    given: Mapping[str, object], splits_batch: bool, world_size: int, spec: ModelSpec
) -> list[str]:
    reasons = []
    if splits_batch:
        reasons.append(
            f"cfg=2: {world_size} ranks are even and {spec.name} has guidance; no_split_batch uses "
            "patches only"
        )
        idle = [f"{name}={given[name]}" for name in ("parallelism", "sync_mode") if name in given]
        if idle and world_size == 2:
            reasons.append(
                f"no effect of {' and '.join(idle)}: the halves of guidance take both ranks; "
                "no_split_batch uses them for it"
            )
    if not given.keys() & {"warmup_steps", "warm_up_steps"}:
        reasons.append(
            f"warmup_steps={DEFAULT_WARMUP_STEPS}: the default of synchronous steps at the start"
        )
    if given.get("split_scheme", "row") != "row" and given.get("parallelism") != "naive_patch":
        reasons.append(
            f"split_scheme={given['split_scheme']} has no effect: only parallelism=naive_patch "
            "cuts in other ways than rows"
        )
    if given.get("extrapolate") and (
        given.get("parallelism", "patch") != "patch" or not _is_displaced(given)
    ):
        reasons.append(
            "extrapolate has no effect: no values of the step before are received in this mode"
        )
    return reasons


def _is_displaced(given: Mapping[str, object]) -> bool:
    return SYNC_MODES[str(given.get("sync_mode", "corrected_async_gn"))].attention == "later"


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise PlanError(f"{name}={value!r} is not allowed. Allowed: {', '.join(allowed)}.")
    return str(value)


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PlanError(f"{name}={value!r} is not allowed. Give a whole number from 0.")
    return value


def _patch_weights(text: object) -> tuple[float, ...]:
    """'1.0,0.6' or a list of numbers -> relative speeds of the ranks. PlanError if one is not a
    positive number.
    """
    parts = text.split(",") if isinstance(text, str) else text
    try:
        weights = tuple(float(part) for part in parts)
    except ValueError:
        weights = ()
    if not weights or any(not 0 < weight < float("inf") for weight in weights):
        raise PlanError(
            f"patch_weights={text!r} is not allowed. Give one positive number per rank of an "
            "image, such as 1.0,0.6."
        )
    return weights
