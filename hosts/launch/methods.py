"""The methods between which a loaded host changes from job to job, and which of them generates a
request: by its quality, steps, guidance and size. Imports no torch.

No weights move when the method changes: the ranks detach one backend and attach another
(hosts/ranks/loop.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from backends.autotune.candidates import Candidate
from backends.autotune.ranking import Image, Measured, choose, rank
from backends.errors import UnsupportedError
from backends.plan import QUALITIES, ParallelPlan, Quality

FEW, MANY = 4, 50
"""Numbers of steps for which methods are prepared, besides the model type's own: synchronous steps
at the start weigh more in short images.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The methods for one kind of image on some number of ranks."""

    names: tuple[str, ...] = ()
    """Best first; empty if none is close enough."""
    image_s: float = inf
    """Of the best one: seconds for the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """The methods of a host, each ready to be attached."""

    of_size: Mapping[int, Mapping[str, Candidate]]
    """Number of ranks -> name -> method. The first is that of a job without any special wish."""
    quality: Quality | None = None
    """Of requests that name none. None if the method was named at launch: then it decides."""
    measured: Measured | None = None
    """The figures behind the choice; None if there is nothing to choose."""
    _best: dict[tuple[int, Quality, Image], Best] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def named(cls, *plans: ParallelPlan) -> "Methods":
        """Return one method for each number of ranks, as named at launch."""
        return cls(
            of_size={
                plan.world_size: {
                    plan.method: Candidate(
                        name=plan.method, backend=plan.method, ranks=plan.world_size, plan=plan
                    )
                }
                for plan in plans
            }
        )

    def names(
        self, asked: Quality | None, *, ranks: int, num_steps: int, pixels: float, halves: int
    ) -> tuple[str, ...]:
        """Return the methods that may generate an image on this many ranks, the best one first.

        asked: the request's quality. pixels: relative to the host's usual size. halves: predictions
        per step, 2 with guidance. UnsupportedError if no method meets the quality.
        """
        if self.measured is None or self.quality is None:
            return tuple(self.of_size[ranks])
        image = Image(num_steps=num_steps, pixels=pixels, halves=halves)
        if not (names := self._find(ranks, asked or self.quality, image).names):
            raise UnsupportedError(
                f"quality={asked or self.quality!r} is not available on {ranks} ranks of this host "
                f"with {num_steps} steps: each of its methods there "
                f"({', '.join(self.of_size[ranks])}) is less close. Ask for another quality, or "
                "start the host with --mode=auto."
            )
        return names

    def quickest(self, asked: Quality | None, sizes: Sequence[int], **image: Any) -> int:
        """Return the number of ranks, of `sizes`, that generate one image soonest. The largest if
        that was not measured.
        """
        if self.measured is None or self.quality is None:
            return max(sizes)
        key = asked or self.quality, Image(**image)
        known = [size for size in sizes if size in self.of_size]
        return min(known, key=lambda size: (self._find(size, *key).image_s, -size))

    def measured_s(self, name: str, *, ranks: int, **image: Any) -> float | None:
        """Return the seconds that a method was measured to take for the steps of an image. None if
        it was not measured for images of this kind.
        """
        asked = Image(**image)
        if self.measured is None or name not in self.of_size.get(ranks, ()):
            return None
        if (asked.pixels, asked.halves) != (1.0, self.measured.work.halves):
            return None
        (row,) = rank([self.of_size[ranks][name]], self.measured, quality="fast", image=asked)
        return None if row.measured_s is None or row.refusal else row.image_s

    def _find(self, ranks: int, quality: Quality, image: Image) -> Best:
        assert self.measured is not None
        key = ranks, quality, image
        if key not in self._best:
            self._best[key] = _best(list(self.of_size[ranks].values()), self.measured, *key[1:])
        return self._best[key]


def worth_preparing(
    candidates: Sequence[Candidate],
    measured: Measured,
    *,
    ranks: int,
    quality: Quality,
    num_steps: int,
) -> dict[str, Candidate]:
    """Return the methods that are best for some request on this many ranks, by name, and all exact
    ones that were measured: a method cannot do every size. The first one is that of `quality` and
    `num_steps`, if there is one.
    """
    levels = (quality, *(level for level in QUALITIES if level != quality))
    found = {}
    for level in levels:
        for image in _images(num_steps, measured.work.halves):
            rows = rank(candidates, measured, quality=level, image=image)
            if (best := choose(rows, ranks=ranks)) is not None:
                found.setdefault(best.candidate.name, best.candidate)
    for row in rank(candidates, measured, quality="exact", image=Image(num_steps=num_steps)):
        if row.candidate.ranks == ranks and row.measured_s is not None and not row.refusal:
            found.setdefault(row.candidate.name, row.candidate)
    return found


def _images(num_steps: int, halves: int) -> Iterator[Image]:
    for number in dict.fromkeys((num_steps, FEW, MANY)):
        for guided in dict.fromkeys((halves, 1)):
            yield Image(num_steps=number, halves=guided)


def _best(found: Sequence[Candidate], measured: Measured, quality: Quality, image: Image) -> Best:
    """Return the best method, then the others by time: the next one is for requests that a method
    cannot do.
    """
    rows = [row for row in rank(found, measured, quality=quality, image=image) if not row.refusal]
    best = choose(rows)
    if best is None:
        return Best()
    others = [row.candidate.name for row in rows if row is not best]
    return Best(names=(best.candidate.name, *others), image_s=best.image_s)
