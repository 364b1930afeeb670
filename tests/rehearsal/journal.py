"""What one rank did that other ranks or its own host may have to wait for."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

HERE = str(Path(__file__).parent)
REPOSITORY = str(Path(__file__).parents[2])
NOT_THE_PLACE = (f"{Path('/torch/')}", HERE, "/importlib/", "/contextlib.py", "/threading.py")
"""In the paths of files that are never the answer to 'where in the program?'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call on an NCCL group. `number` identifies it on its rank, for Wait. step: that was
    computed then.

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
    step: str = ""
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
    between two GPUs. pinned_bytes: of main memory.
    """

    entries: list[Entry] = field(default_factory=list)
    host_waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    pinned_bytes: int = 0
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
    inner = own = None
    frame = sys._getframe(1)  # a traceback would look at the files of all frames, for each call
    while frame is not None and own is None:
        file = frame.f_code.co_filename
        if not any(part in file for part in NOT_THE_PLACE):
            inner = inner or frame
            if file.startswith(REPOSITORY) and "site-packages" not in file:
                own = frame
        frame = frame.f_back
    if inner is None:
        return "?"
    return _short(inner) if own in (None, inner) else f"{_short(inner)} < {_short(own)}"


def _short(frame: FrameType) -> str:
    name = frame.f_code.co_filename.split("site-packages/")[-1].removeprefix(REPOSITORY + "/")
    return f"{name}:{frame.f_lineno}"
