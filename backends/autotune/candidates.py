"""Candidates of `--backend=auto`: every way to run a model type on some number of ranks. No torch.

A candidate is a backend with degrees and modes, with or without a step cache. The backend's own
`make_plan` decides whether it is possible. Refused candidates stay in the list with their reason,
so that the table can show it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from backends import plan_module
from backends.errors import HostError
from backends.model_table import ModelSpec
from backends.plan import QUALITIES, ParallelPlan, Quality, divisors
from backends.step_cache_spec import StepCacheSpec, parse_step_cache, require_step_cache

PREDICTION: Mapping[str, Quality] = {"prediction,2": "high", "prediction,3": "fast"}
CACHES: Mapping[str, Mapping[str, Quality]] = {
    "unet": {"deep,2": "high", "deep,3": "fast", **PREDICTION},
    "transformer": {"taylor,2": "fast", "taylor,3": "fast", **PREDICTION},
}
"""Kind of denoiser -> the caches that are candidates, with the quality for which they count until
`measure` has compared them on the loaded model: by their dB on the demo model (docs/quality.md),
and where that depends on the sampler or was not measured, less as a precaution.
"""
Check = Callable[[ParallelPlan], None]
"""Raises a HostError for a plan that other launch options rule out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to generate an image: a method that a host can attach between two jobs."""

    name: str  # unique, shown to users
    backend: str
    ranks: int
    options: Mapping[str, object] = field(default_factory=dict)  # launch options that select it
    plan: ParallelPlan | None = None  # None if it was refused
    refusal: str = ""  # why it was refused
    step_cache: StepCacheSpec | None = None  # None: that of the launch, if there is one
    cache_quality: Quality = "exact"  # of the step cache
    timed_as: str = ""  # the candidate whose measured time is also this one's

    @property
    def quality(self) -> Quality:
        """The strictest quality that it meets, as far as is known without measuring."""
        plan_quality = self.plan.quality if self.plan is not None else "fast"
        return max(plan_quality, self.cache_quality, key=QUALITIES.index)


def list_candidates(
    spec: ModelSpec,
    given: Mapping[str, object],
    world_size: int,
    *,
    features: Sequence[str] = (),
    is_guided: bool = True,
    check: Check = lambda plan: None,
    has_caches: bool = True,
) -> list[Candidate]:
    """Return all candidates for every number of ranks that divides `world_size`.

    Order: fewest ranks first, then the backends of the model table. Candidates that amount to the
    same (the CFG split alone is shared code) appear once, under the first backend.

    given: launch options, including `checkpoint`, from which heads and blocks are counted.
    features: features of the model table that the launch asks for. is_guided: whether guidance is
    on; otherwise splitting its halves gains nothing. check: see Check. has_caches: whether step
    caches are candidates too.
    """
    found: dict[object, Candidate] = {}
    for ranks in divisors(world_size):
        for backend in spec.backends:
            ways = plan_module(backend).candidates(spec, ranks, is_guided=is_guided)
            for way, options in ways:
                name = f"{backend} {way}".strip()
                candidate = _candidate(spec, given, ranks, backend, name, options, features, check)
                found.setdefault(_identity(candidate), candidate)
    plain = list(found.values())
    return [*plain, *(_with_caches(spec, plain) if has_caches else ())]


def _with_caches(spec: ModelSpec, plain: Sequence[Candidate]) -> Iterator[Candidate]:
    """Yield each candidate with each cache that its method and the model table allow."""
    caches = CACHES.get(spec.denoiser, {})
    for candidate in plain:
        for text, quality in caches.items() if not candidate.timed_as else ():
            cache = parse_step_cache(text, spec)
            try:
                spec.require(candidate.backend, "step_cache")
                if candidate.plan is not None:
                    require_step_cache(cache, candidate.plan)
            except HostError:
                continue
            if candidate.plan is not None and not candidate.plan.step_cache:
                yield replace(
                    candidate,
                    name=f"{candidate.name} + {cache}",
                    step_cache=cache,
                    # nobody has measured how stale values and skipped steps add up
                    cache_quality=quality if candidate.quality == "exact" else "fast",
                )


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
        made = plan_module(backend).make_plan(spec, {**given, **options}, ranks)
        check(made)
        plan = made
    except HostError as error:
        refusal = str(error)
    way, _, variant = name.partition(", ")
    return Candidate(
        name=name,
        backend=backend,
        ranks=ranks,
        options=options,
        plan=plan,
        refusal=refusal,
        timed_as=way if variant else "",
    )


def _identity(candidate: Candidate) -> object:
    if candidate.plan is None:
        return candidate.name
    axes = tuple((axis, degree) for axis, degree in candidate.plan.axes if degree > 1)
    return axes if axes == (("cfg", 2),) else candidate.name
