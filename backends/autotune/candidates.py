"""Every way in which some number of ranks can make one image of a model type: what `--backend=auto`
chooses from. Imports no torch.

A way is a backend with degrees and modes. Whether it can be is the backend's own `make_plan` to
say; what it refuses stays in the list with its reason, so that the table of the choice tells it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from backends import planner
from backends.errors import HostError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan

Quality = Literal["exact", "high", "fast"]
QUALITIES: tuple[Quality, ...] = ("exact", "high", "fast")
"""From the strictest: an image like one rank's; one that was measured to come close
(docs/quality.md); any.
"""
Check = Callable[[ParallelPlan], None]
"""Raises the HostError of a plan that other options of the launch rule out."""
CLOSE_SYNC_MODES = ("corrected_async_gn", "sync_gn")
"""Of distrifuser's approximate modes those above 45 dB in docs/quality.md. Their values are one
step old, whatever the number of ranks.
"""
CLOSE_SEGMENTS = 2
"""asyncdiff's values grow a step older with each further segment, and only two were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way. options: the launch options that ask for it. plan: None where `refusal` says why it
    cannot be.
    """

    name: str
    backend: str
    ranks: int
    options: Mapping[str, object] = field(default_factory=dict)
    plan: ParallelPlan | None = None
    refusal: str = ""

    @property
    def quality(self) -> Quality:
        return quality_of(self.plan) if self.plan is not None else "fast"


def quality_of(plan: ParallelPlan) -> Quality:
    """The strictest quality that a plan meets."""
    if plan.exactness != "approximate":
        return "exact"
    options = plan.options
    is_close_patch = (
        options.get("sync_mode") in CLOSE_SYNC_MODES and options.get("parallelism") == "patch"
    )
    is_close_segment = options.get("model_n") == CLOSE_SEGMENTS and options.get("stride") == 1
    return "high" if is_close_patch or is_close_segment else "fast"


def meets(plan: ParallelPlan, quality: Quality) -> bool:
    return QUALITIES.index(quality_of(plan)) <= QUALITIES.index(quality)


def list_candidates(
    spec: ModelSpec,
    given: Mapping[str, object],
    world_size: int,
    *,
    features: Sequence[str] = (),
    is_guided: bool = True,
    check: Check = lambda plan: None,
) -> list[Candidate]:
    """All ways with every number of ranks that divides `world_size`, fewest ranks first, then in
    the table's order of backends.

    given: launch options, with `checkpoint`, so that heads and blocks can be counted. features: of
    the model table, which the launch asks for. is_guided: images have two halves of guidance;
    without them nothing is gained by splitting them. check: see Check. Ways that come to the same
    thing (the CFG split alone is shared code) appear once, under the first backend.
    """
    found: dict[object, Candidate] = {}
    for ranks in _divisors(world_size):
        for backend, name, options in _ways(spec, ranks, is_guided=is_guided):
            candidate = _candidate(spec, given, ranks, backend, name, options, features, check)
            found.setdefault(_identity(candidate), candidate)
    return list(found.values())


def _candidate(
    spec: ModelSpec,
    given: Mapping[str, object],
    ranks: int,
    backend: str,
    name: str,
    options: Mapping[str, object],
    features: Sequence[str],
    check: Check,
) -> Candidate:
    plan, refusal = None, ""
    try:
        spec.require(backend)
        for feature in features:
            spec.require(backend, feature)
        made = planner(backend)(spec, {**given, **options}, ranks)
        check(made)
        plan = made
    except HostError as error:
        refusal = str(error)
    return Candidate(
        name=name, backend=backend, ranks=ranks, options=options, plan=plan, refusal=refusal
    )


def _identity(candidate: Candidate) -> object:
    if candidate.plan is None:
        return candidate.name
    axes = tuple((axis, degree) for axis, degree in candidate.plan.axes if degree > 1)
    return axes if axes == (("cfg", 2),) else candidate.name


def _ways(
    spec: ModelSpec, ranks: int, *, is_guided: bool
) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(backend, name, options) of everything that is worth asking a backend's make_plan for."""
    if ranks == 1:
        yield "single", "single", {}
        return
    generators = {"distrifuser": _patches, "asyncdiff": _segments, "xdit": _sequences}
    for backend in spec.backends:
        if backend in generators:
            for name, options in generators[backend](spec, ranks, is_guided):
                yield backend, f"{backend} {name}", options


def _halves(ranks: int, is_guided: bool) -> list[int]:
    """Degrees of the CFG split."""
    return [2, 1] if is_guided and ranks % 2 == 0 else [1]


def _patches(
    spec: ModelSpec, ranks: int, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    for cfg in _halves(ranks, is_guided and spec.guidance == "cfg"):
        whole: dict[str, object] = {} if cfg == 2 else {"no_split_batch": True}
        if cfg == ranks:
            yield "cfg 2", whole
            continue
        for sync_mode in ("corrected_async_gn", "full_sync"):
            yield (
                f"{_times(cfg=cfg, patch=ranks // cfg)} {sync_mode}",
                whole | {"sync_mode": sync_mode},
            )


def _segments(
    spec: ModelSpec, ranks: int, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    for cfg in _halves(ranks, is_guided and spec.guidance != "distilled"):
        shared: dict[str, object] = (
            {"use_cfg_parallel": True} if cfg == 2 else {"use_cfg_parallel": False}
        )
        if cfg == ranks:
            yield "cfg 2", shared
            continue
        for stride in (1, 2):
            model_n = ranks // cfg - stride + 1
            if model_n >= 2:
                yield (
                    _times(cfg=cfg, segment=model_n) + f" stride {stride}",
                    shared | {"model_n": model_n, "stride": stride},
                )


def _sequences(
    spec: ModelSpec, ranks: int, is_guided: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    for cfg in _halves(ranks, is_guided and spec.guidance == "cfg"):
        rest = ranks // cfg
        for stage in _divisors(rest):
            for ring in _divisors(rest // stage):
                ulysses = rest // stage // ring
                degrees = {
                    "ulysses_degree": ulysses,
                    "ring_degree": ring,
                    "pipefusion_parallel_degree": stage,
                }
                options: dict[str, object] = {
                    name: degree for name, degree in degrees.items() if degree > 1
                }
                name = _times(cfg=cfg, pipefusion=stage, ring=ring, ulysses=ulysses)
                if spec.denoiser == "transformer" or rest == 1:
                    yield name, options | ({"use_cfg_parallel": True} if cfg == 2 else {})


def _times(**degrees: int) -> str:
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
