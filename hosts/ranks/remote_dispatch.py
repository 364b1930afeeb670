"""The desk of a team that is led by another rank than 0: its first rank asks, and a thread on rank
0 answers, over a line of their own.

Jobs so stay in one queue, and progress, cancellation, previews and deadlines work for every job as
if rank 0 did it.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from backends.groups.control_group import Channel
from backends.request import Array, GenerateRequest, GenerateResult
from hosts.ranks.commands import Command, Failure, Generate, Outcome, Rejoin, give_next

GO_ON, CANCEL = 0, 1


@dataclass(frozen=True, slots=True)
class NextCommand:
    """Answered by a command."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """Answered by the word for the next step, and the rows that somebody looks at. previews: of
    those rows.
    """

    step: int
    num_steps: int
    previews: Mapping[int, Array | None]


@dataclass(frozen=True, slots=True)
class Generated:
    results: Sequence[GenerateResult]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Leave:
    """The team takes no more jobs."""


class RemoteDispatcher:
    """On the first rank of a team.

    The word for a step was asked for when the step before was done: rank 0 computes too, and its
    thread that answers must wait for the interpreter. So nobody waits for the word, and a cancelled
    job may make one step more.
    """

    def __init__(self, line: Channel, *, rank: int) -> None:
        self._line = line
        self._rank = rank
        self._rows_in_view: tuple[int, ...] = ()
        self._word_is_due = False

    def next_command(self, check: Callable[[GenerateRequest], None]) -> Command:
        """Generate or Gather. What `check` refuses is answered here, and the other ranks never see
        it.
        """
        while isinstance(command := self._next(), Generate):
            try:
                for request in command.requests:
                    check(request)
            except Exception as error:  # noqa: BLE001  the other ranks never see what is refused here, for whatever reason
                self.generated(
                    [], Outcome(failure=Failure.of(error, rank=self._rank), groups_are_broken=False)
                )
                continue
            return command
        return command

    def step_signal(self) -> int:
        if not self._word_is_due:
            return GO_ON
        self._word_is_due = False
        word, self._rows_in_view = self._line.receive()
        return word

    def step_done(self, step: int, num_steps: int, preview: Callable[[int], Array | None]) -> None:
        self._line.send(
            StepDone(step, num_steps, {row: preview(row) for row in self._rows_in_view})
        )
        self._word_is_due = True

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None:
        self._tell(Generated(results, outcome))
        self._rows_in_view = ()

    def leave(self) -> None:
        self._tell(Leave())

    def _next(self) -> Command:
        self._tell(NextCommand())
        return self._line.receive()

    def _tell(self, message: Generated | Leave | NextCommand) -> None:
        # of a step that will not come: a message gets through when the other end receives, and it
        # still sends this one
        self.step_signal()
        self._line.send(message)


class LocalDispatcher(Protocol):
    """What a service needs of rank 0's own end."""

    rows_in_view: tuple[int, ...]

    def next_command(self, check: Callable[[GenerateRequest], None]) -> Command: ...

    def step_signal(self) -> int: ...

    def step_done(
        self, step: int, num_steps: int, preview: Callable[[int], Array | None]
    ) -> None: ...

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None: ...

    def leave(self) -> None: ...


class DispatchServer:
    """A thread on rank 0 that lets another team's first rank use a desk, until that team gathers or
    leaves.
    """

    def __init__(
        self, line: Channel, dispatcher: LocalDispatcher, *, on_loss: Callable[[], None]
    ) -> None:
        """on_loss: called when the other end is gone or something here fails, so that no team takes
        a new job.
        """
        self._line = line
        self._dispatcher = dispatcher
        self._on_loss = on_loss
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="team", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the team has left; raise whatever ended its service before."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._serve(self._line.receive()):
                pass
        except Exception as error:  # noqa: BLE001  the main thread raises it when the teams meet, and the ranks are started again
            self._error = error
            self._on_loss()
            self._dispatcher.leave()

    def _give_command(self) -> Command:
        def send(command: Command) -> Command:
            self._line.send(command)
            return command

        take = partial(
            self._dispatcher.next_command, lambda request: None
        )  # the team's first rank checks
        return give_next(
            take, send, lambda outcome: self._dispatcher.generated([], outcome), rank=0
        )

    def _serve(self, message: object) -> bool:
        """Whether the team goes on."""
        match message:
            case NextCommand():
                return not isinstance(self._give_command(), Rejoin)
            case StepDone():
                self._dispatcher.step_done(message.step, message.num_steps, message.previews.get)
                self._line.send((self._dispatcher.step_signal(), self._dispatcher.rows_in_view))
            case Generated():
                self._dispatcher.generated(message.results, message.outcome)
            case Leave():
                self._on_loss()
                self._dispatcher.leave()
                return False
        return True
