"""What ranks exchange between images: commands from rank 0, and outcomes from all."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from backends.errors import CancelledError, HostError, RankError, UnsendableError
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Axis
from backends.request import GenerateRequest, LoadRequest

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory"
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "could not create a primitive",
    "could not create a memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""In messages of torch, oneDNN and CUDA's libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load this pipeline and attach the plan's backend."""

    request: LoadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Generate these images, in one batch if there are several. Each request has its seed."""

    job_ids: tuple[str, ...]
    requests: tuple[GenerateRequest, ...]
    methods: tuple[str, ...] = ()
    """The names of the methods that may generate them, the best one first. The team's first rank
    leaves only the first that can do the requests. Empty: the one that is attached.
    """
    is_switch: bool = False
    """Whether the ranks must attach the method, even if it was attached last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitIntoTeams:
    """Split into teams, each with jobs of its own, until all rejoin."""

    team_size: int
    """Ranks of each team."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoin:
    """Tell a team to join the other ranks again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Leave the loop."""


Command = Load | Generate | SplitIntoTeams | Rejoin | Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a command failed on one rank."""

    rank: int
    error: HostError | None
    """The client's error or the cancellation; None for a fault of this program or the machine."""
    message: str
    trace: str
    time_s: float
    """Wall clock, to find the first of several failures."""

    @property
    def is_retryable(self) -> bool:
        """Whether a retry may succeed: not a client error and not out of memory."""
        return self.error is None and not self.message.startswith(OUT_OF_MEMORY)

    @classmethod
    def of(cls, error: BaseException, *, rank: int, time_s: float | None = None) -> "Failure":
        """time_s: of the failure, where it was a while ago."""
        return cls(
            rank=rank,
            error=error if isinstance(error, HostError) else None,
            message=_explain(error),
            trace=traceback.format_exc(),
            time_s=time.time() if time_s is None else time_s,
        )

    def as_error(self) -> HostError:
        """Return what the client reads: its own error as it is, any other with the rank that
        failed.

        Without the frames in which it was raised, since they hold the tensors of the whole run.
        """
        if self.error is None:
            message = f"rank {self.rank} failed: {self.message}"
            return RankError(message, rank=self.rank, trace=self.trace)
        error: BaseException | None = self.error
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        return self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What all ranks of a team agree on after a command."""

    failure: Failure | None
    groups_are_broken: bool
    """Whether a rank closed its data groups, to wake ranks that waited for it."""
    figures: tuple[Mapping[str, Any], ...] = ()
    """Each rank's, in rank order."""


def give_next(
    take: Callable[[], Command | None],
    send: Callable[[Command | None], T],
    refuse: Callable[[Outcome], None],
    *,
    rank: int,
) -> T:
    """Take commands until one can be sent; what `send` returns. refuse: hears why one could not be,
    before the next is taken.
    """
    while True:
        command = take()
        try:
            return send(command)
        except UnsendableError as error:
            refuse(Outcome(failure=Failure.of(error, rank=rank), groups_are_broken=False))


def agree_on_outcome(
    failure: Failure | None, figures: Mapping[str, Any] | None = None, among: Axis | None = None
) -> Outcome:
    """Gather every rank's failure and figures, and return the same outcome on every rank.

    among: the control group of a team; None for all ranks.
    """
    outcomes = gather_outcomes((failure, figures or {}), among)
    return replace(
        merge_outcomes([failure for failure, _ in outcomes]),
        figures=tuple(figures for _, figures in outcomes),
    )


def merge_outcomes(outcomes: Sequence[Failure | None]) -> Outcome:
    """Take the earliest failure as the cause. A failing rank closes its groups, so the others'
    closed connections are later.
    """
    failures = [outcome for outcome in outcomes if outcome is not None]
    breaking = [failure for failure in failures if breaks_groups(failure)]
    return Outcome(
        failure=min(breaking or failures, key=lambda failure: failure.time_s, default=None),
        groups_are_broken=bool(breaking),
    )


def breaks_groups(failure: Failure) -> bool:
    """Whether the rank closes its groups. After a cancellation all ranks stop at the same step, so
    none does.
    """
    return not isinstance(failure.error, CancelledError)


def _is_lack_of_memory(error: BaseException) -> bool:
    """Return whether memory was missing. On the CPU torch says so in a RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def _explain(error: BaseException) -> str:
    if _is_lack_of_memory(error):
        lines = str(error).splitlines() or [type(error).__name__]
        return (
            f"{OUT_OF_MEMORY}. Ask for a smaller image, start with --enable_vae_tiling, a smaller "
            "--variant, more ranks, "
            "--quantize_to=int8 or --enable_model_cpu_offload. "
            f"({lines[0]})"
        )
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
