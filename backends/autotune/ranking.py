"""Candidates with their predicted and measured times, in one table: which one `--backend=auto`
takes, and why. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from backends.autotune.candidates import Candidate
from backends.autotune.cost import Estimate, Link, Work, as_json, predict
from backends.errors import ConfigError
from backends.plan import QUALITIES, Quality

CLOSE_CALL = 1.04
"""A candidate must be this much quicker to be preferred to one that is stricter in quality, or has
fewer ranks: measuring is no finer.
"""
NUM_TRIED = 3
"""Candidates that are tried at most, beside one rank."""
HOPELESS = 1.3
"""A candidate that is predicted to take this much longer than the quickest measured one is not
tried.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a launch has measured, kept for the next one."""

    work: Work
    link: Link
    memory_bytes: int | None = None  # of the smallest device; None: not known
    steps: Mapping[str, float] = field(default_factory=dict)  # candidate's name -> seconds per step
    failures: Mapping[str, str] = field(default_factory=dict)  # candidate's name -> why it failed
    date: str = ""  # of the measurement

    def to_json(self) -> dict[str, Any]:
        return {
            "work": as_json(self.work),
            "link": as_json(self.link),
            "memory_bytes": self.memory_bytes,
            "steps": dict(self.steps),
            "failures": dict(self.failures),
            "date": self.date,
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "Measured":
        """TypeError or KeyError if it is not what `to_json` makes."""
        return cls(**{**kept, "work": Work(**kept["work"]), "link": Link(**kept["link"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate in the table."""

    candidate: Candidate
    estimate: Estimate | None = None  # None only for a candidate that is refused
    measured_s: float | None = None  # seconds per step
    image_s: float = float("inf")  # seconds for all steps of an image
    refusal: str = ""  # why it cannot be chosen

    @property
    def step_s(self) -> float:
        """Measured, or else predicted."""
        assert self.estimate is not None
        return self.estimate.step_s if self.measured_s is None else self.measured_s

    def facts(self) -> dict[str, Any]:
        """For GET /settings and --check --json."""
        facts: dict[str, Any] = {"method": self.candidate.name, "ranks": self.candidate.ranks}
        if self.candidate.plan is not None:
            facts["quality"] = self.candidate.quality
        if self.estimate is not None:
            facts["predicted_step_s"] = _rounded(self.estimate.step_s)
            facts["measured_step_s"] = (
                None if self.measured_s is None else _rounded(self.measured_s)
            )
            facts["image_s"] = _rounded(self.image_s)
            facts["memory_mb"] = round(self.estimate.memory_bytes / 1e6)
        return facts | ({"refused": self.refusal} if self.refusal else {})


def rank(
    candidates: Sequence[Candidate], measured: Measured, *, quality: Quality, num_steps: int
) -> list[Row]:
    """The table: candidates that can be had from the quickest on, then the others with their
    reasons.
    """
    rows = [_row(candidate, measured, quality, num_steps) for candidate in candidates]
    return sorted(rows, key=lambda row: (bool(row.refusal), row.image_s))


def _row(candidate: Candidate, measured: Measured, quality: Quality, num_steps: int) -> Row:
    if candidate.plan is None:
        return Row(candidate=candidate, refusal=candidate.refusal)
    estimate = predict(candidate.plan, measured.work, measured.link)
    step_s = measured.steps.get(candidate.name)
    row = Row(
        candidate=candidate,
        estimate=estimate,
        measured_s=step_s,
        image_s=estimate.image_s(num_steps, step_s=step_s),
    )
    if QUALITIES.index(candidate.quality) > QUALITIES.index(quality):
        return replace(row, refusal=f"--quality={quality} leaves it out: it is {candidate.quality}")
    if measured.memory_bytes is not None and estimate.memory_bytes > measured.memory_bytes:
        needed, present = (
            f"{value / 1e9:.1f} GB" for value in (estimate.memory_bytes, measured.memory_bytes)
        )
        return replace(
            row, refusal=f"it needs about {needed} on each rank, and {present} are there"
        )
    if candidate.name in measured.failures:
        return replace(row, refusal=f"it was tried and failed: {measured.failures[candidate.name]}")
    return row


def next_to_try(rows: Sequence[Row]) -> Candidate | None:
    """The best predicted candidate that is not measured, unless it has no hope of being the
    quickest.
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
    """The quickest by their measured times, if several are close: what disturbed one trial may not
    decide between them.
    """
    able = [row for row in rows if not row.refusal and row.measured_s is not None]
    close = [row.candidate for row in able if row.image_s <= HOPELESS * able[0].image_s]
    return close if len(close) > 1 else []


def choose(rows: Sequence[Row], *, ranks: int | None = None) -> Row | None:
    """The quickest that can be had; None if nothing can. ranks: only of that number.

    Where methods were tried only those are chosen: a measured time beats a predicted one. Among
    those within CLOSE_CALL of the quickest the strictest in quality wins, then the one with the
    fewest ranks, then the quickest.
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
        key=lambda row: (QUALITIES.index(row.candidate.quality), row.candidate.ranks, row.image_s),
    )


def require_any(rows: Sequence[Row]) -> Row:
    """The choice, or ConfigError with everyone's reason."""
    if (chosen := choose(rows)) is not None:
        return chosen
    reasons = "; ".join(f"{row.candidate.name}: {row.refusal.rstrip('.')}" for row in rows)
    raise ConfigError(
        f"no method is left for --backend=auto ({reasons}). Ask for a smaller size, a smaller "
        "--variant, --quantize_to, "
        "--enable_model_cpu_offload or a less strict --quality, or name a --backend to try it all "
        "the same."
    )


def as_text(rows: Sequence[Row], chosen: Row | None) -> list[str]:
    """The table for people, one line each."""
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
            f"{mark} {row.candidate.name:46} {row.candidate.ranks:5} {row.candidate.quality:7}  "
            f"{figures}{refusal}"
        )
    return lines


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
