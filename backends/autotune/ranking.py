"""Ranks candidates by predicted and measured times, and chooses for `--backend=auto`. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from backends.autotune.candidates import Candidate
from backends.autotune.cost import Estimate, Link, Work, as_json, predict, resized, with_cache
from backends.errors import ConfigError
from backends.plan import FEW_STEPS, PROMISED_DB, QUALITIES, Quality, is_met

CLOSE_CALL = 1.04
"""A candidate must be faster by this factor to win over one with stricter quality or fewer ranks.
Measurements are no more precise.
"""
NUM_TRIED = 3
"""Largest number of candidates that are tried, besides one rank."""
HOPELESS = 1.3
"""A candidate is not tried if its prediction exceeds the fastest measurement by this factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of a launch, cached for the next one."""

    work: Work
    link: Link
    memory_bytes: int | None = None  # of the smallest device; None if unknown
    steps: Mapping[str, float] = field(default_factory=dict)  # candidate's name -> seconds per step
    failures: Mapping[str, str] = field(default_factory=dict)  # candidate's name -> why it failed
    date: str = ""  # when it was measured
    # Candidate's name -> PSNR of its latents against one rank, in dB (closeness.py).
    closeness: Mapping[str, float] = field(default_factory=dict)
    # Candidate's name -> its second best trial / its best: how much the machine disturbed them.
    spread: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "work": as_json(self.work),
            "link": as_json(self.link),
            "memory_bytes": self.memory_bytes,
            "steps": dict(self.steps),
            "failures": dict(self.failures),
            "date": self.date,
            "closeness": dict(self.closeness),
            "spread": dict(self.spread),
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Measured":
        """Read what `to_json` returned. TypeError or KeyError for anything else."""
        return cls(**{**kept, "work": Work(**kept["work"]), "link": Link(**kept["link"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate in the table."""

    candidate: Candidate
    estimate: Estimate | None = None  # None only for a refused candidate
    measured_s: float | None = None  # seconds per step
    image_s: float = float("inf")  # seconds for all steps of an image
    refusal: str = ""  # why it cannot be chosen
    quality: Quality = "fast"  # measured if available, else what is known of the method
    closeness_db: float | None = None

    @property
    def step_s(self) -> float:
        """Seconds per step: measured if available, else predicted."""
        assert self.estimate is not None
        return self.estimate.step_s if self.measured_s is None else self.measured_s

    def facts(self) -> dict[str, Any]:
        """Return the row as JSON for GET /settings and --check --json."""
        facts: dict[str, Any] = {"method": self.candidate.name, "ranks": self.candidate.ranks}
        if self.candidate.plan is not None:
            facts["quality"] = self.quality
        if self.estimate is not None:
            facts["predicted_step_s"] = _rounded(self.estimate.step_s)
            facts["measured_step_s"] = (
                None if self.measured_s is None else _rounded(self.measured_s)
            )
            facts["image_s"] = _rounded(self.image_s)
            facts["memory_mb"] = round(self.estimate.memory_bytes / 1e6)
        if self.closeness_db is not None:
            facts["closeness_db"] = round(self.closeness_db, 1)
        return facts | ({"refused": self.refusal} if self.refusal else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What decides between methods for one image."""

    num_steps: int
    pixels: float = 1.0  # relative to the size that was measured
    halves: int | None = None  # predictions per step; None: as measured


def rank(
    candidates: Sequence[Candidate],
    measured: Measured,
    *,
    quality: Quality,
    image: Image,
    is_sharded: bool = False,
) -> list[Row]:
    """Return one row per candidate: possible ones, fastest first, then refused ones.

    is_sharded: whether the ranks divide the weights (see cost.predict).
    """
    rows = [_row(candidate, measured, quality, image, is_sharded) for candidate in candidates]
    return sorted(rows, key=lambda row: (bool(row.refusal), row.image_s))


def _row(
    candidate: Candidate, measured: Measured, quality: Quality, image: Image, is_sharded: bool
) -> Row:
    if candidate.plan is None:
        return Row(candidate=candidate, refusal=candidate.refusal)
    work = measured.work
    estimate = planned = _estimate(candidate, work, measured.link, is_sharded)
    step_s = measured.steps.get(candidate.timed_as or candidate.name)
    halves = work.halves if image.halves is None else image.halves
    if (image.pixels, halves) != (1.0, work.halves):
        other = resized(work, pixels=image.pixels, halves=halves)
        estimate = _estimate(candidate, other, measured.link, is_sharded)
        step_s = None if step_s is None else step_s * estimate.step_s / planned.step_s
    row = Row(
        candidate=candidate,
        estimate=estimate,
        measured_s=step_s,
        image_s=estimate.image_s(image.num_steps, step_s=step_s),
        quality=_quality(candidate, measured),
        closeness_db=measured.closeness.get(candidate.name),
    )
    if row.closeness_db is not None and row.closeness_db < PROMISED_DB["fast"]:
        return replace(row, refusal=f"its image was another one: {row.closeness_db:.1f} dB")
    if not is_met(quality, row.quality, num_steps=image.num_steps):
        why = f"it is {row.quality}"
        if quality == row.quality:
            why = f"the image has fewer than {FEW_STEPS} steps"
        return replace(row, refusal=f"--quality={quality} excludes it: {why}")
    if measured.memory_bytes is not None and estimate.memory_bytes > measured.memory_bytes:
        needed, present = (
            f"{value / 1e9:.1f} GB" for value in (estimate.memory_bytes, measured.memory_bytes)
        )
        return replace(
            row, refusal=f"it needs about {needed} on each rank, but only {present} are available"
        )
    if candidate.name in measured.failures:
        return replace(row, refusal=f"it was tried and failed: {measured.failures[candidate.name]}")
    return row


def _estimate(candidate: Candidate, work: Work, link: Link, is_sharded: bool) -> Estimate:
    assert candidate.plan is not None
    estimate = predict(candidate.plan, work, link, is_sharded=is_sharded)
    return estimate if candidate.step_cache is None else with_cache(estimate, candidate.step_cache)


def _quality(candidate: Candidate, measured: Measured) -> Quality:
    """Return the level whose promise the measured closeness keeps; without one, the known level."""
    decibels = measured.closeness.get(candidate.name)
    if decibels is None or candidate.quality == "exact":
        return candidate.quality
    return "high" if decibels >= PROMISED_DB["high"] else "fast"


def next_to_try(rows: Sequence[Row]) -> Candidate | None:
    """Return the candidate with the best prediction that is not measured yet.

    None if none has a chance of being the fastest.
    """
    able = [row for row in rows if not row.refusal]
    best_s = min((row.image_s for row in able if row.measured_s is not None), default=float("inf"))
    return next(
        (
            row.candidate
            for row in able
            if row.measured_s is None and row.image_s < HOPELESS * best_s
        ),
        None,
    )


def contenders(rows: Sequence[Row]) -> list[Candidate]:
    """Return the fastest measured candidates if several are close, else an empty list.

    They are measured again, so that a disturbance of one trial does not decide.
    """
    able = [row for row in rows if not row.refusal and row.measured_s is not None]
    close = [row.candidate for row in able if row.image_s <= HOPELESS * able[0].image_s]
    return close if len(close) > 1 else []


def choose(rows: Sequence[Row], *, ranks: int | None = None) -> Row | None:
    """Return the fastest possible row; None if there is none. ranks: consider only this number of
    ranks.

    Once a multi-rank method has been measured, only measured rows count. Among rows within
    CLOSE_CALL of the fastest, the strictest quality wins, then the fewest ranks, then the closest
    image, then the shortest time.
    """
    able = [row for row in rows if not row.refusal and ranks in (None, row.candidate.ranks)]
    if any(row.measured_s is not None and row.candidate.ranks > 1 for row in able):
        able = [row for row in able if row.measured_s is not None]
    if not able:
        return None
    limit = CLOSE_CALL * min(row.image_s for row in able)
    close = [row for row in able if row.image_s <= limit]
    return min(
        close,
        key=lambda row: (
            QUALITIES.index(row.quality),
            row.candidate.ranks,
            -(row.closeness_db or 0.0),
            row.image_s,
        ),
    )


def require_any(rows: Sequence[Row]) -> Row:
    """Return the chosen row. ConfigError with the reason of every candidate if there is none."""
    if (chosen := choose(rows)) is not None:
        return chosen
    reasons = "; ".join(f"{row.candidate.name}: {row.refusal.rstrip('.')}" for row in rows)
    raise ConfigError(
        f"no method is left for --backend=auto ({reasons}). Ask for a smaller size, a smaller "
        "--variant, --quantize_to, --shard=always, --enable_model_cpu_offload or a less strict "
        "--quality, or name a --backend to try it all the same."
    )


def as_text(rows: Sequence[Row], chosen: Row | None) -> list[str]:
    """Return the table as text lines. The chosen row is marked with *."""
    lines = [
        "  method                                         ranks quality  s/step            s/image "
        " MB/rank"
    ]
    for row in rows:
        mark = "*" if chosen is not None and row.candidate.name == chosen.candidate.name else " "
        if row.estimate is None:
            lines.append(f"{mark} {row.candidate.name:46} {row.candidate.ranks:5} {row.refusal}")
            continue
        how = "measured" if row.measured_s is not None else "predicted"
        figures = (
            f"{row.step_s:<8.3g}{how:9} {row.image_s:9.3g} {row.estimate.memory_bytes / 1e6:8.0f}"
        )
        refusal = f"  no: {row.refusal}" if row.refusal else ""
        lines.append(
            f"{mark} {row.candidate.name:46} {row.candidate.ranks:5} {row.quality:7}  "
            f"{figures}{refusal}"
        )
    return lines


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
