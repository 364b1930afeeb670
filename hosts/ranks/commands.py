"""What ranks say to each other between images: commands from rank 0, and outcomes from all."""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backends.errors import CancelledError, HostError, RankError
from backends.parallel.distributed import Axis, gather_outcomes
from backends.request import GenerateRequest, LoadRequest

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load this pipeline and attach the plan's backend."""

    request: LoadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Make these images, in one batch if there are several. Each request's seed is drawn."""

    job_ids: tuple[str, ...]
    requests: tuple[GenerateRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitIntoTeams:
    """Split into teams of so many ranks, each with jobs of its own, until all gather."""

    team_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoin:
    """To a team: meet the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Leave the loop."""


Command = Load | Generate | SplitIntoTeams | Rejoin | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a command ended on one rank that failed. time_s: wall clock, to find the first of
    several.
    """

    rank: int
    error: HostError | None
    message: str
    trace: str
    time_s: float

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may do well the next time: nobody's mistake, and not a lack of
        memory, which stays the same.
        """
        return self.error is None and not self.message.startswith(OUT_OF_MEMORY)

    @classmethod
    def of(cls, error: BaseException, *, rank: int) -> "Failure":
        return cls(
            rank=rank,
            error=error if isinstance(error, HostError) else None,
            message=_explain(error),
            trace=traceback.format_exc(),
            time_s=time.time(),
        )

    def as_error(self) -> HostError:
        """What the client reads: a user's mistake as it is, anything else with the rank it happened
        on.
        """
        return self.error or RankError(
            f"rank {self.rank} failed: {self.message}", rank=self.rank, trace=self.trace
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What all ranks of a team agree on after a command. groups_are_broken: a rank closed its data
    groups to wake the others.

    figures: each rank's, in rank order.
    """

    failure: Failure | None
    groups_are_broken: bool
    figures: tuple[Mapping[str, Any], ...] = ()


def agree_on_outcome(
    failure: Failure | None, figures: Mapping[str, Any] | None = None, among: Axis | None = None
) -> Outcome:
    """Every rank's failure, if any, and its figures -> the same outcome on every rank.

    among: the control group of a team; None for all ranks.
    """
    outcomes = gather_outcomes((failure, figures or {}), among)
    return replace(
        merge_outcomes([failure for failure, _ in outcomes]),
        figures=tuple(figures for _, figures in outcomes),
    )


def merge_outcomes(outcomes: Sequence[Failure | None]) -> Outcome:
    """The failure that came first is the cause: a rank that fails closes its groups, so closed
    connections come after their reason.
    """
    failures = [outcome for outcome in outcomes if outcome is not None]
    breaking = [failure for failure in failures if breaks_groups(failure)]
    return Outcome(
        failure=min(breaking or failures, key=lambda failure: failure.time_s, default=None),
        groups_are_broken=bool(breaking),
    )


def breaks_groups(failure: Failure) -> bool:
    """Not after a cancellation: there all ranks stopped at the same place by agreement."""
    return not isinstance(failure.error, CancelledError)


def _explain(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"{OUT_OF_MEMORY}. Ask for a smaller image, start with --enable_vae_tiling, a smaller "
            "--variant, or more ranks. "
            f"({str(error).splitlines()[0]})"
        )
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
