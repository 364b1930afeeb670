"""Launch settings of the xdit backend -> ParallelPlan. Imports no torch: the launcher calls it
before anything loads.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backends.errors import PlanError
from backends.model_table import ModelSpec
from backends.parallel.transformer_spec import TransformerSpec
from backends.parallel.transformers import TRANSFORMERS, names_with
from backends.plan import Exactness, ParallelPlan, divisors, require_world_size
from backends.step_cache_spec import parse_step_cache
from backends.xdit.cost import cost
from backends.xdit.options import OPTIONS, READS, SETTINGS, candidates

__all__ = ["OPTIONS", "READS", "candidates", "cost", "make_plan"]

PATCHES_PER_STAGE = 2
"""Half as many where the halves of guidance fill the stages too: every pass reads all weights of
its stage once more.
"""
DEFAULT_WARMUP_STEPS = 1
_MASKS = "masks its attention to perturb it, and a rank with a part of the tokens has no such mask"
NOT_SPREAD = {
    "Flux2KleinKVPipeline": (
        "keeps the keys of its reference images from the first step for the others, and ranks that "
        "spread tokens would need each other's"
    ),
    "GlmImagePipeline": (
        "reads the words in quotation marks as text, and without any it is one token, which ranks "
        "cannot share"
    ),
    "StableDiffusion3PAGImg2ImgPipeline": _MASKS,
    "StableDiffusion3PAGPipeline": _MASKS,
}
"""Pipeline -> why its tokens cannot be spread, though its transformer's can."""
READS_PREVIOUS_STEP = (
    "PipeFusion: its patches attend to keys and values of the step before, and a skipped step has "
    "none. Use Ulysses, ring or the CFG split"
)
BEGINS_NEXT_STEP = (
    "PipeFusion, whose predictions are still under way when the next step begins. Use Ulysses, "
    "ring or the CFG split"
)


def make_plan(spec: ModelSpec, options: Mapping[str, object], world_size: int) -> ParallelPlan:
    """The degrees that were asked for, or, if none was, a choice with its reasons.

    options: launch settings by name, None or absent where unset; `checkpoint` (a folder) lets head
    and block counts be checked. Raises PlanError if the degrees do not fit the ranks, the model
    type or each other.
    """
    shape = _Shape.of(spec, options)
    degrees, why_degrees = _given(options), []
    if degrees is None:
        degrees, why_degrees = _chosen(spec, shape, world_size)
    plan_options, why_options = _method_options(spec, options, degrees, shape)
    step_cache, why_cache = _step_cache(spec, options, degrees)
    plan = ParallelPlan(
        method="xdit",
        axes=tuple((axis, degrees[axis]) for axis in SETTINGS if degrees[axis] > 1),
        exactness=_exactness(degrees),
        splits_weights_by=_splits_weights_by(degrees),
        runs_every_block=degrees["stage"] == 1,
        reads_previous_step=READS_PREVIOUS_STEP if degrees["stage"] > 1 else "",
        begins_next_step=BEGINS_NEXT_STEP if degrees["stage"] > 1 else "",
        intercepts_sdpa=True,
        step_cache=step_cache,
        options=plan_options,
        reasons=(*why_degrees, *why_options, *why_cache),
    )
    _check_product(spec, shape, degrees, world_size)
    _check_fit(spec, shape, degrees)
    return require_world_size(plan, world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Facts of the checkpoint's transformer that limit the degrees; None: not known yet."""

    num_heads: int | None = None
    num_blocks: int | None = None
    class_name: str | None = None

    @property
    def row(self) -> TransformerSpec | None:
        return TRANSFORMERS.get(self.class_name) if self.class_name is not None else None

    def lacks(self, fact: str) -> bool:
        """Whether the class is known, and not to have this fact of TransformerSpec."""
        return self.class_name is not None and not getattr(self.row, fact, False)

    @classmethod
    def of(cls, spec: ModelSpec, options: Mapping[str, object]) -> "_Shape":
        checkpoint = options.get("checkpoint")
        path = Path(str(checkpoint)) / spec.denoiser / "config.json"
        if checkpoint is None or not path.is_file():
            return cls()
        config = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: value for name, value in config.items() if isinstance(value, int)}
        return cls(  # a UNet's may be lists, one number for each level
            num_heads=counts.get("num_attention_heads", counts.get("n_heads")),
            num_blocks=counts.get("num_layers", counts.get("n_layers", 0))
            + counts.get("num_single_layers", 0)
            or None,
            class_name=config.get("_class_name"),
        )


def _given(options: Mapping[str, object]) -> dict[str, int] | None:
    """The degrees in the settings; None if none is set."""
    if all(
        options.get(setting) is None or options[setting] is False for setting in SETTINGS.values()
    ):
        return None
    degrees = {
        axis: _degree(setting, options.get(setting))
        for axis, setting in SETTINGS.items()
        if axis != "cfg"
    }
    return degrees | {"cfg": 2 if options.get("use_cfg_parallel") else 1}


def _degree(setting: str, value: object) -> int:
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{setting}={value!r} is not allowed. Allowed: whole numbers from 1.")
    return value


def _chosen(spec: ModelSpec, shape: _Shape, world_size: int) -> tuple[dict[str, int], list[str]]:
    """Choose CFG first where there are two halves, then Ulysses as far as the heads divide, and
    ring for the rest. Return the reasons too.
    """
    degrees, reasons = dict.fromkeys(SETTINGS, 1), []
    rest = world_size
    if spec.guidance == "cfg" and spec.guidance_scale > 1 and world_size % 2 == 0:
        degrees["cfg"], rest = 2, world_size // 2
        reasons.append(
            "use_cfg_parallel: the two halves of guidance need no communication but their results, "
            "and ranks are even."
        )
    if rest == 1 or spec.denoiser != "transformer":
        return degrees, reasons
    degrees["ulysses"] = rest if shape.num_heads is None else math.gcd(shape.num_heads, rest)
    degrees["ring"] = rest // degrees["ulysses"]
    if degrees["ulysses"] > 1:
        reasons.append(f"ulysses_degree={degrees['ulysses']}: it talks less than ring.")
    if degrees["ring"] > 1:
        reasons.append(
            f"ring_degree={degrees['ring']}: {shape.num_heads} heads do not divide by {rest}, and "
            "ring needs no division."
        )
    return degrees, reasons


def _method_options(
    spec: ModelSpec,
    options: Mapping[str, object],
    degrees: Mapping[str, int],
    shape: _Shape,
) -> tuple[dict[str, object], list[str]]:
    """Resolve what PipeFusion reads. Return the reasons too."""
    if degrees["stage"] == 1:
        return {}, []
    reasons = []
    num_patches = options.get("num_pipeline_patch")
    if num_patches is None:
        per_stage = PATCHES_PER_STAGE // (
            2 if spec.guidance == "cfg" and degrees["cfg"] == 1 else 1
        )
        num_patches = per_stage * degrees["stage"]
        reasons.append(
            f"num_pipeline_patch={num_patches}: {per_stage} for each stage "
            f"keep{'s' if per_stage == 1 else ''} all stages busy."
        )
    warmup_steps = options.get("warmup_steps")
    if warmup_steps is None:
        warmup_steps = DEFAULT_WARMUP_STEPS
    blocks = _blocks_per_stage(options.get("attn_layer_num_for_pp"), degrees["stage"], shape)
    return {
        "num_pipeline_patch": _degree("num_pipeline_patch", num_patches),
        "warmup_steps": _degree("warmup_steps", warmup_steps),
        "attn_layer_num_for_pp": blocks,
    }, reasons


def _step_cache(
    spec: ModelSpec, options: Mapping[str, object], degrees: Mapping[str, int]
) -> tuple[str, list[str]]:
    """Return the cache that use_fbcache, the old clients' option, stands for. Where there can be
    none it is not refused.
    """
    if not options.get("use_fbcache") or options.get("step_cache") is not None:
        return "", []
    if spec.denoiser != "transformer" or degrees["stage"] > 1:
        return "", ["--use_fbcache has no effect: it is for transformers without PipeFusion"]
    cache = parse_step_cache("first_block", spec)
    reason = f"step_cache={cache}: that is what --use_fbcache means; results are approximate"
    return cache.kind, [reason]


def _splits_weights_by(degrees: Mapping[str, int]) -> str:
    axis = next((axis for axis in ("stage", "tensor") if degrees[axis] > 1), None)
    return _flag(axis) if axis is not None else ""


def _blocks_per_stage(value: object, num_stages: int, shape: _Shape) -> tuple[int, ...] | None:
    """Blocks of each stage; None: an even cut."""
    if value is None:
        return None
    numbers = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        blocks = tuple(int(number) for number in numbers)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"attn_layer_num_for_pp={value!r} is not a list of whole numbers. Give one for each "
            "stage, such as 10,9."
        ) from error
    total = f", together {shape.num_blocks}" if shape.num_blocks else ""
    if (
        len(blocks) != num_stages
        or min(blocks) < 1
        or (shape.num_blocks and sum(blocks) != shape.num_blocks)
    ):
        raise PlanError(
            f"attn_layer_num_for_pp={list(blocks)} does not fit. Allowed: {num_stages} numbers "
            f"from 1{total}."
        )
    return blocks


def _exactness(degrees: Mapping[str, int]) -> Exactness:
    if degrees["stage"] > 1:
        return "approximate"
    return "reordered" if degrees["ring"] > 1 or degrees["tensor"] > 1 else "exact"


def _check_product(
    spec: ModelSpec, shape: _Shape, degrees: Mapping[str, int], world_size: int
) -> None:
    if math.prod(degrees.values()) == world_size:
        return
    given = (
        " x ".join(f"{_flag(axis)} {degrees[axis]}" for axis in SETTINGS if degrees[axis] > 1)
        or "no degree above 1"
    )
    valid = (
        "; ".join(_describe(set_) for set_ in _valid_sets(spec, shape, world_size))
        or "none for this model type"
    )
    raise PlanError(
        f"xdit: {given} = {math.prod(degrees.values())} ranks, but {world_size} are started. "
        f"Allowed for {world_size}: {valid}."
    )


def _check_fit(spec: ModelSpec, shape: _Shape, degrees: Mapping[str, int]) -> None:
    problem = _problem(spec, shape, degrees)
    if problem:
        world_size = math.prod(degrees.values())
        valid = (
            "; ".join(_describe(set_) for set_ in _valid_sets(spec, shape, world_size))
            or "none; use another backend"
        )
        raise PlanError(f"{problem} Allowed for {world_size} ranks: {valid}.")


def _problem(spec: ModelSpec, shape: _Shape, degrees: Mapping[str, int]) -> str | None:
    """Why these degrees cannot be had, or None."""
    spread = degrees["ulysses"] * degrees["ring"] * degrees["stage"] * degrees["tensor"]
    if spec.denoiser != "transformer" and spread > 1:
        return f"type {spec.name!r} has a UNet, which xdit runs with CFG and data parallelism only."
    if spread > 1 and shape.class_name is not None and shape.row is None:
        return (
            f"the blocks of a {shape.class_name} are not known, so xdit cannot spread its tokens. "
            f"Known are {', '.join(sorted(TRANSFORMERS))}."
        )
    if spread > 1 and spec.pipeline in NOT_SPREAD:
        return f"{spec.title} {NOT_SPREAD[spec.pipeline]}."
    if spec.is_generic and degrees["stage"] * degrees["tensor"] * degrees["data"] > 1:
        return (
            f"{spec.title} has no row in the model table, and without one xdit splits guidance "
            "(use_cfg_parallel) and spreads tokens (ulysses_degree, ring_degree) only."
        )
    if degrees["cfg"] > 1 and spec.guidance != "cfg":
        return (
            f"use_cfg_parallel is not available for type {spec.name!r}: its guidance is "
            f"{spec.guidance}, there are no two halves."
        )
    if degrees["tensor"] > 1 and shape.lacks("has_tensor_plan"):
        return (
            f"tensor_parallel_degree is not available for type {spec.name!r}: diffusers has no "
            "tensor plan for its transformer."
        )
    if shape.num_heads is not None and shape.num_heads % degrees["tensor"]:
        return (
            f"tensor_parallel_degree={degrees['tensor']} does not divide the {shape.num_heads} "
            "attention heads."
        )
    if degrees["tensor"] > 1 and degrees["stage"] > 1:
        return (
            "tensor_parallel_degree and pipefusion_parallel_degree both give up weights, and "
            "are not available together."
        )
    num_heads = (
        shape.num_heads // degrees["tensor"] if shape.num_heads is not None else degrees["ulysses"]
    )
    if degrees["ulysses"] > num_heads:
        return (
            f"ulysses_degree={degrees['ulysses']} is more than the {num_heads} attention "
            "heads: "
            "ranks would have nothing to do."
        )
    if degrees["stage"] > 1 and shape.row is not None and shape.row.crosses_skips:
        return (
            f"pipefusion_parallel_degree is not available for type {spec.name!r}: its "
            "later blocks read skip connections from earlier ones."
        )
    if degrees["stage"] > 1 and shape.lacks("has_stages"):
        return (
            f"pipefusion_parallel_degree is not available for a {shape.class_name}: PipeFusion "
            f"cuts {', '.join(names_with('has_stages'))} only."
        )
    if shape.num_blocks is not None and degrees["stage"] > shape.num_blocks:
        return (
            f"pipefusion_parallel_degree={degrees['stage']} is more than the "
            f"{shape.num_blocks} "
            "transformer blocks."
        )
    return None


def _valid_sets(spec: ModelSpec, shape: _Shape, world_size: int) -> list[dict[str, int]]:
    """Combinations of CFG, Ulysses, ring and PipeFusion that fit, in order of preference; at most
    eight.
    """
    found = []
    for cfg in (1, 2):
        for ulysses in divisors(world_size // cfg if world_size % cfg == 0 else 0):
            for ring in divisors(world_size // cfg // ulysses):
                degrees = dict.fromkeys(SETTINGS, 1) | {
                    "cfg": cfg,
                    "ulysses": ulysses,
                    "ring": ring,
                }
                degrees["stage"] = world_size // cfg // ulysses // ring
                if _problem(spec, shape, degrees) is None:
                    found.append(degrees)
    return sorted(
        found, key=lambda degrees: (degrees["stage"] > 1, degrees["ring"] > 1, -degrees["cfg"])
    )[:8]


def _flag(axis: str) -> str:
    return f"--{SETTINGS[axis]}"


def _describe(degrees: Mapping[str, int]) -> str:
    flags = [
        _flag(axis) if axis == "cfg" else f"{_flag(axis)}={degrees[axis]}"
        for axis in SETTINGS
        if degrees[axis] > 1
    ]
    return " ".join(flags) or "no flag"
