"""Every way in which some number of ranks can make one image of a model type: what `--backend=auto`
chooses from. Imports no torch.

A way is a backend with degrees and modes. Whether it can be is the backend's own `make_plan` to
say; what it refuses stays in the list with its reason, so that the table of the choice tells it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from backends import plan_module
from backends.errors import HostError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan, Quality, divisors

Check = Callable[[ParallelPlan], None]
"""Raises the HostError of a plan that other options of the launch rule out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to generate an image."""

    name: str  # for people, unique
    backend: str
    ranks: int
    options: Mapping[str, object] = field(default_factory=dict)  # launch options that ask for it
    plan: ParallelPlan | None = None  # None where it cannot be had
    refusal: str = ""  # why not

    @property
    def quality(self) -> Quality:
        return self.plan.quality if self.plan is not None else "fast"


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
    for ranks in divisors(world_size):
        for backend in spec.backends:
            ways = plan_module(backend).candidates(spec, ranks, is_guided=is_guided)
            for way, options in ways:
                name = f"{backend} {way}".strip()
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
        made = plan_module(backend).make_plan(spec, {**given, **options}, ranks)
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
