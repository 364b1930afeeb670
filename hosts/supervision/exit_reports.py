"""How the ranks ended: which one was lost, why, and the last lines of its log.

Ranks and their agent leave notes in a folder of the launcher, which outlives them. The next rank 0
reads them when it takes over the jobs, so that a job that is given up says why. Imports no torch.
"""

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hosts.supervision.board import Board
from hosts.supervision.parent_watch import EXIT_LOST_RANK

MAX_LINES = 10
MAX_CHARS = 2000
"""Lines and characters of a log in a reason."""
KEPT_LINES = 100
"""Lines of a log in a note: some may be about other jobs."""
CONSEQUENCES = (EXIT_LOST_RANK, -signal.SIGTERM)
"""Exit codes of ranks that end because another one did: by themselves, or by the agent."""
CRASHES = frozenset(
    -number
    for number in (
        signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS
    )
)  # fmt: skip
"""Exit codes of ranks that were ended by what they themselves did."""
SECRET_FILE = "secret"
UNEXPLAINED = "rank 0 ended without a reason"

Lines = tuple[tuple[str | None, str], ...]
"""Lines of a log, each with its job, or the jobs of a batch separated by blanks; None for a line
about no job.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitReport:
    """Why the ranks ended."""

    why: str
    """The beginning of a sentence."""
    rank: int | None = None
    """The lost rank, if it is known."""
    lines: Lines = ()
    """The last lines of that rank's log."""
    is_seen_only: bool = False
    """Whether the rank was only found to be gone, so that its exit code says more."""
    is_crash: bool = False
    """Whether that rank ended by what it did itself, such as a segmentation fault."""
    jobs: tuple[str, ...] | None = None
    """The jobs that it worked on; None if that is not known."""

    def last_lines(self, job_id: str) -> str:
        """Return a sentence with the last lines, without those about other jobs; empty if there are
        none.
        """
        lines = [text for job, text in self.lines if job is None or job_id in job.split()]
        if not lines:
            return ""
        return (
            f"The last lines of the log of rank {self.rank}:\n"
            + "\n".join(lines[-MAX_LINES:])[-MAX_CHARS:]
        )

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "ExitReport":
        """ValueError, TypeError or KeyError if the text is not a report."""
        facts = json.loads(text)
        lines = tuple((job and str(job), str(line)) for job, line in facts["lines"])
        jobs = None if facts["jobs"] is None else tuple(map(str, facts["jobs"]))
        return cls(**{**facts, "why": str(facts["why"]), "lines": lines, "jobs": jobs})


UNKNOWN = ExitReport(why=UNEXPLAINED, rank=0, is_seen_only=True)


class RankNotes:
    """The notes of one attempt: of all ranks between one start and the next."""

    def __init__(self, folder: Path, *, attempt: int, first_rank: int = 0) -> None:
        """attempt: number of restarts before. first_rank: of this machine; its agent counts from
        0.
        """
        self._folder = folder
        self._attempt = attempt
        self._first_rank = first_rank

    def log_file(self, rank: int) -> Path | None:
        """Where this rank's log is kept (hosts/supervision/log.py)."""
        return self._path(f"rank{rank}.log")

    def record_crash(self, rank: int) -> None:
        """Write this process's Python stack here if a fatal signal ends it, such as a segmentation
        fault.
        """
        faulthandler.enable(self._path(f"rank{rank}.crash").open("w"), all_threads=False)

    @property
    def board(self) -> Board | None:
        """Where the ranks of this machine give signs of life."""
        return Board(self._path("said"))

    @property
    def meeting(self) -> Path | None:
        """File in which the ranks of this machine find each other."""
        return self._path("meeting")

    @property
    def secret(self) -> bytes:
        """What only processes of this user know, for the ranks of this machine. The launcher makes
        it (hosts/supervision/agent_process.py).
        """
        return (self._folder / SECRET_FILE).read_bytes()

    def mark(self, what: str) -> None:
        """Note that the ranks are 'ready', or have 'served' an image."""
        with contextlib.suppress(OSError), self._path(what).open("x") as file:
            file.write(str(time.monotonic()))

    def marked_s(self, what: str) -> float | None:
        """Return when it was marked first, by the machine's monotonic clock; None if never."""
        with contextlib.suppress(OSError, ValueError):
            return float(self._path(what).read_text())
        return None

    def put_modules(self, names: Sequence[str]) -> None:
        """Note which modules a rank has imported, in their order, for spare ranks."""
        with contextlib.suppress(OSError):
            (self._folder / "modules").write_text("\n".join(names), encoding="utf-8")

    def modules(self) -> list[str]:
        return _read(self._folder / "modules")

    def put_jobs(self, rank: int, jobs: Sequence[str]) -> None:
        """Note which jobs this rank works on from now on."""
        with contextlib.suppress(OSError):
            self._path(f"rank{rank}.jobs").write_text(json.dumps(list(jobs)), encoding="utf-8")

    def jobs(self, rank: int) -> tuple[str, ...] | None:
        """Return the jobs that this rank worked on when it ended; None if that is not known."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path(f"rank{rank}.jobs").read_text(encoding="utf-8"))
            return tuple(map(str, found)) if isinstance(found, list) else None
        return None

    def put_exits(self, exits: Mapping[int, int]) -> None:
        """Note exit codes, negative for a signal, by rank as the agent counts."""
        with contextlib.suppress(OSError):
            self._path("exits").write_text(json.dumps(exits), encoding="utf-8")

    def exits(self) -> dict[int, int]:
        """Rank -> exit code."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path("exits").read_text(encoding="utf-8"))
            return {self._first_rank + int(rank): code for rank, code in found.items()}
        return {}

    def lines(self, rank: int) -> Lines:
        """Return the last lines of this rank's log, and the stack of a crash."""
        found: list[tuple[str | None, str]] = []
        for path in (self._path(f"rank{rank}.log.1"), self._path(f"rank{rank}.log")):
            for line in _read(path):
                # the last one may have been cut off
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    found += [(record["job"], text) for text in record["text"].splitlines()]
        crash = [line for line in _read(self._path(f"rank{rank}.crash")) if line.strip()]
        return (*found[-KEPT_LINES:], *((None, line) for line in crash[: MAX_LINES - 2]))

    def complete(self, ending: ExitReport) -> ExitReport:
        """Return the report with what the agent saw, the lost rank's jobs, and the last lines of
        its log.
        """
        exits = {rank: code for rank, code in self.exits().items() if code not in CONSEQUENCES}
        if ending.is_seen_only and exits:
            rank = ending.rank if ending.rank in exits else min(exits)
            ending = replace(
                ending,
                why=f"rank {rank} {_how(exits[rank])}",
                rank=rank,
                # one that is killed may make others abort
                is_crash=CRASHES.issuperset(exits.values()),
            )
        if ending.rank is None:
            return ending
        return replace(
            ending,
            jobs=self.jobs(ending.rank),
            lines=ending.lines or self.lines(ending.rank),
        )

    def forget_older(self) -> None:
        """Remove the notes of attempts before this one."""
        for path in self._folder.glob("*-*"):
            number = path.name.partition("-")[0]
            if number.isdigit() and int(number) < self._attempt:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._attempt}-{name}"


class NoNotes(RankNotes):
    """Of ranks without a launcher: nothing is kept."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull), attempt=0)

    def log_file(self, rank: int) -> Path | None:
        return None

    def record_crash(self, rank: int) -> None: ...

    @property
    def board(self) -> None:
        return None

    @property
    def meeting(self) -> None:
        return None

    @property
    def secret(self) -> bytes:
        return b""

    def mark(self, what: str) -> None: ...

    def put_modules(self, names: Sequence[str]) -> None: ...

    def put_jobs(self, rank: int, jobs: Sequence[str]) -> None: ...

    def complete(self, ending: ExitReport) -> ExitReport:
        return ending


def _read(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL, which the kernel sends when memory runs out"
    return (
        f"was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"ended with exit code {code}"
    )
