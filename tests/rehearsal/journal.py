"""What one rank did that other ranks or its own host may have to wait for."""

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = str(Path(__file__).parent)
REPOSITORY = str(Path(__file__).parents[2])
NOT_THE_PLACE = (f"{Path('/torch/')}", HERE, "/importlib/", "/contextlib.py", "/threading.py")
"""In the paths of files that are never the answer to 'where in the program?'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call on an NCCL group. `number` identifies it on its rank, for Wait.

    peer: of a send or receive. source: of a broadcast. sent, received: elements to and from each
    rank of an all-to-all.
    messages: (kind, peer, elements) of a batch of sends and receives.
    """

    number: int
    kind: str
    group: str
    ranks: tuple[int, ...]
    elements: int
    dtype: str
    where: str
    peer: int | None = None
    source: int | None = None
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    messages: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """The stream that computes waits for this operation of its rank."""

    number: int


@dataclass(frozen=True, slots=True)
class HostWait:
    """The host waits for everything that it gave to the stream that computes."""


Entry = Operation | Wait | HostWait


@dataclass(slots=True)
class Journal:
    """entries: in the order of the calls. host_waits: (step, kind, place) -> how often. copies:
    between two GPUs.
    """

    entries: list[Entry] = field(default_factory=list)
    host_waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    step: str = ""

    def host_waited(self, kind: str) -> None:
        self.host_waits[self.step, kind, place()] += 1
        self.entries.append(HostWait())

    def waits_in(self, step: str) -> dict[str, int]:
        """'kind at place' -> how often the host waited in this step."""
        return {
            f"{kind} at {where}": count
            for (of, kind, where), count in self.host_waits.items()
            if of == step
        }


def place() -> str:
    """The innermost line outside torch and the rehearsal, and the innermost of this repository that
    led there.
    """
    frames = [
        frame
        for frame in traceback.extract_stack()
        if not any(part in frame.filename for part in NOT_THE_PLACE)
    ]
    if not frames:
        return "?"
    own = next(
        (
            frame
            for frame in reversed(frames)
            if frame.filename.startswith(REPOSITORY) and "site-packages" not in frame.filename
        ),
        None,
    )
    inner = _short(frames[-1])
    return inner if own is None or own is frames[-1] else f"{inner} < {_short(own)}"


def _short(frame: traceback.FrameSummary) -> str:
    name = frame.filename.split("site-packages/")[-1].removeprefix(REPOSITORY + "/")
    return f"{name}:{frame.lineno}"
