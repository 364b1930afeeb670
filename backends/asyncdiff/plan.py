"""The plan of AsyncDiff: which ranks hold which segment, checked before anything loads. Imports no
torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from backends.asyncdiff.cost import cost
from backends.asyncdiff.options import OPTIONS, READS
from backends.errors import PlanError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan, cfg_degrees, require_world_size, times

__all__ = ["OPTIONS", "READS", "candidates", "cost", "make_plan"]

DEFAULT_WARMUP_STEPS = 3
STRIDES = (1, 2)
CLOSE_SEGMENTS = 2
"""Values grow a step older with each further segment, and only two were measured
(docs/quality.md).
"""
READS_PREVIOUS_STEP = (
    "segments that read the activations of the step before, because a skipped step has none. Use "
    "--step_cache=prediction,2, which skips whole steps, another backend"
)
BEGINS_NEXT_STEP = (
    "--time_shift, which works for the timestep of the next step, since that may be skipped. Leave "
    "out --time_shift"
)
NEEDS_PREWARM = "the first image finds and times the denoiser's units"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Degrees:
    """How the ranks are used. The segment axis has `model_n + stride - 1` ranks: stride 2 runs the
    last segment on one more.
    """

    cfg: int
    model_n: int
    stride: int
    reasons: tuple[str, ...] = ()

    @property
    def segment(self) -> int:
        return self.model_n + self.stride - 1


def make_plan(spec: ModelSpec, options: Mapping[str, object], world_size: int) -> ParallelPlan:
    """Degrees and resolved options. A launch setting that is absent or None is chosen here, with
    its reason.
    """
    degrees = _degrees(spec, options, world_size)
    sharded_by = "--shard_weights" if options.get("shard_weights") else ""
    if options.get("shard") == "always" and degrees.segment > 1:
        sharded_by = "--shard=always"
    plan = ParallelPlan(
        method="asyncdiff",
        axes=(("cfg", degrees.cfg), ("segment", degrees.segment)),
        exactness="approximate" if degrees.segment > 1 else "exact",
        is_close=degrees.model_n == CLOSE_SEGMENTS and degrees.stride == 1,
        splits_weights_by=sharded_by,
        runs_every_block=degrees.segment == 1,
        reads_previous_step=READS_PREVIOUS_STEP if degrees.segment > 1 else "",
        begins_next_step=BEGINS_NEXT_STEP if options.get("time_shift") else "",
        # of such a type it is not known which inputs an image needs
        needs_prewarm="" if spec.runs_as_is else NEEDS_PREWARM,
        options={
            "model_n": degrees.model_n,
            "stride": degrees.stride,
            "time_shift": bool(options.get("time_shift")),
            "warmup_steps": _warmup_steps(options),
            "synced_percent": _synced_percent(options),
            "segment_weights": _segment_weights(options.get("segment_weights"), degrees.model_n),
            "shard_weights": bool(sharded_by),
            "extrapolate": options.get("extrapolate"),
        },
        reasons=degrees.reasons,
    )
    return require_world_size(plan, world_size)


def candidates(
    spec: ModelSpec, ranks: int, *, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    """Segments of either stride, within each half of guidance or over all ranks."""
    if ranks == 1:
        return
    for cfg in cfg_degrees(ranks, has_halves=is_guided and spec.has_halves):
        shared: dict[str, object] = {"use_cfg_parallel": cfg == 2}
        if cfg == ranks:
            yield "cfg 2", shared
            continue
        for stride in STRIDES:
            model_n = ranks // cfg - stride + 1
            if model_n >= 2:
                name = f"{times(cfg=cfg, segment=model_n)} stride {stride}"
                yield name, shared | {"model_n": model_n, "stride": stride}


def _degrees(spec: ModelSpec, options: Mapping[str, object], world_size: int) -> _Degrees:
    if world_size < 2:
        raise PlanError(
            "backend 'asyncdiff' needs at least 2 ranks, but 1 is started. Use --nproc_per_node=2 "
            "or backend 'single'."
        )
    cfg, cfg_reasons = _cfg_degree(spec, options, world_size)
    ranks = world_size // cfg
    model_n, stride = _whole(options, "model_n"), _whole(options, "stride")
    if stride is not None and stride not in STRIDES:
        raise PlanError(f"stride={stride} is not allowed. Allowed: 1, 2. Use one of them.")
    if model_n is not None and model_n < 1 + (ranks > 1):
        raise PlanError(
            f"model_n={model_n} is not allowed. Allowed: 2 and more segments. Use 2, or backend "
            "'single'."
        )
    reasons = []
    if stride is None:
        stride = (
            ranks - model_n + 1 if model_n is not None and ranks - model_n + 1 in STRIDES else 1
        )
        reasons.append(
            f"stride={stride}: not given, and the one that fits {ranks} ranks per copy of the model"
        )
    if model_n is None:
        model_n = max(1, ranks - stride + 1)
        reasons.append(
            f"model_n={model_n}: not given, one segment for each of {ranks} ranks per copy of the "
            f"model with stride {stride}"
        )
    degrees = _Degrees(cfg=cfg, model_n=model_n, stride=stride, reasons=(*cfg_reasons, *reasons))
    _require_ranks(degrees, world_size)
    return degrees


def _require_ranks(degrees: _Degrees, world_size: int) -> None:
    wanted = degrees.cfg * degrees.segment
    if wanted != world_size or degrees.model_n < degrees.stride:
        times = " x 2 for use_cfg_parallel" if degrees.cfg == 2 else ""
        wanted = max(wanted, degrees.cfg * 3) if degrees.model_n < degrees.stride else wanted
        raise PlanError(
            f"model_n={degrees.model_n} and stride={degrees.stride} need {wanted} ranks (model_n + "
            f"stride - 1{times}), "
            f"but {world_size} are started. Start {wanted} with --nproc_per_node={wanted}, or "
            "leave out both to let the ranks decide."
        )


def _cfg_degree(
    spec: ModelSpec, options: Mapping[str, object], world_size: int
) -> tuple[int, tuple[str, ...]]:
    asked = options.get("use_cfg_parallel")
    if asked:
        if not spec.has_halves:
            kind = "in three parts" if spec.guidance == "three" else spec.guidance
            raise PlanError(
                f"use_cfg_parallel is not available for model type {spec.name!r}: its guidance is "
                f"{kind}, so there is no second half "
                "of the batch. Leave it out."
            )
        if world_size % 2:
            raise PlanError(
                f"use_cfg_parallel needs an even number of ranks, but {world_size} are started. "
                "Start one more, or leave it out."
            )
        return 2, ()
    is_open = asked is None and options.get("model_n") is None and options.get("stride") is None
    if is_open and spec.runs_as_is and spec.has_halves and world_size % 2 == 0:
        return 2, (
            "use_cfg_parallel=true: the halves of guidance are looked for in the first step, and "
            "splitting them is exact",
        )
    if is_open and world_size >= 4 and world_size % 2 == 0 and spec.has_halves:
        return 2, (
            f"use_cfg_parallel=true: {world_size} ranks are even, and splitting the guidance "
            "halves is exact",
        )
    return 1, ()


def _whole(options: Mapping[str, object], name: str) -> int | None:
    value = options.get(name)
    return None if value is None else int(str(value))


def _warmup_steps(options: Mapping[str, object]) -> int:
    given = options.get("warmup_steps")
    steps = DEFAULT_WARMUP_STEPS if given is None else int(str(given))
    if steps < 0:
        raise PlanError(
            f"warmup_steps={steps} is not allowed. Allowed: 0 and more synchronous steps. Use "
            f"{DEFAULT_WARMUP_STEPS}."
        )
    return steps


def _synced_percent(options: Mapping[str, object]) -> float:
    percent = float(str(options.get("synced_percent") or 0))
    if not 0 <= percent <= 100:
        raise PlanError(
            f"synced_percent={percent:g} is not allowed. Allowed: 0 to 100. Use 0 to count by "
            "warmup_steps."
        )
    return percent


def _segment_weights(given: object, model_n: int) -> tuple[float, ...] | None:
    """Relative speed of each segment's rank, '1,1,0.6' or a list: a slower card gets less."""
    if given is None or given == "":
        return None
    items = given.split(",") if isinstance(given, str) else given
    try:
        weights = tuple(float(item) for item in items)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"segment_weights={given!r} are not numbers. Give {model_n}, such as "
            f"{','.join(['1'] * model_n)}."
        ) from error
    if len(weights) != model_n or min(weights) <= 0:
        raise PlanError(
            f"segment_weights={given!r} do not fit: {model_n} segments need {model_n} numbers "
            "above 0, one for each rank's speed."
        )
    return weights
