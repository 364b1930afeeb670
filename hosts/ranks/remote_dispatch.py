"""The dispatcher of a team that does not include rank 0: the team's first rank asks, and a thread
on rank 0 answers, over a channel of their own.

So all jobs stay in one queue, and progress, cancellation, previews and deadlines work as if rank 0
ran the job.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from backends.groups.control_group import Channel
from backends.request import Array, GenerateRequest, GenerateResult
from hosts.ranks.commands import Command, Failure, Generate, Outcome, Rejoin, give_next

GO_ON, CANCEL, END = 0, 1, 2
"""Signals for a step. END: stop there, with an image."""
Check = Callable[[GenerateRequest, Sequence[str]], None]
"""check(request, methods): raises a HostError for a request that none of these methods can do."""


@dataclass(frozen=True, slots=True)
class NextCommand:
    """Answered by a command."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """Answered by the signal for the next step, and the rows that clients watch."""

    step: int
    num_steps: int
    previews: Mapping[int, Array | None]
    """Row that is watched -> its preview."""


@dataclass(frozen=True, slots=True)
class Generated:
    """How a Generate ended. Not answered."""

    results: Sequence[GenerateResult]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Leave:
    """The team takes no more jobs. Not answered."""


class RemoteDispatcher:
    """On the first rank of a team.

    The signal for a step is requested when the step before is done: rank 0 computes too, and its
    answering thread must wait for the interpreter. So the team never waits for the signal, and a
    cancelled job may run one step more.
    """

    def __init__(self, channel: Channel, *, rank: int) -> None:
        self._channel = channel
        self._rank = rank
        self._rows_in_view: tuple[int, ...] = ()
        self._signal_is_due = False

    def next_command(self, check: Check) -> Command:
        """Return Generate or Rejoin. A request that `check` refuses is answered here, and the other
        ranks never see it.
        """
        while isinstance(command := self._next(), Generate):
            try:
                for request in command.requests:
                    check(request, command.methods)
            # the other ranks never see a request that is refused here
            except Exception as error:  # noqa: BLE001
                self.generated(
                    [], Outcome(failure=Failure.of(error, rank=self._rank), groups_are_broken=False)
                )
                continue
            return command
        return command

    def step_signal(self) -> int:
        if not self._signal_is_due:
            return GO_ON
        self._signal_is_due = False
        signal, self._rows_in_view = self._channel.receive()
        return signal

    def step_done(self, step: int, num_steps: int, preview: Callable[[int], Array | None]) -> None:
        self._channel.send(
            StepDone(step, num_steps, {row: preview(row) for row in self._rows_in_view})
        )
        self._signal_is_due = True

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None:
        self._tell(Generated(results, outcome))
        self._rows_in_view = ()

    def leave(self) -> None:
        self._tell(Leave())

    def _next(self) -> Command:
        self._tell(NextCommand())
        return self._channel.receive()

    def _tell(self, message: Generated | Leave | NextCommand) -> None:
        # receive the signal that is still on its way: the other end reads a message only after it
        # has sent that
        self.step_signal()
        self._channel.send(message)


class LocalDispatcher(Protocol):
    """What a server needs of rank 0's own dispatcher."""

    rows_in_view: tuple[int, ...]

    def next_command(self, check: Check) -> Command: ...

    def step_signal(self) -> int: ...

    def step_done(
        self, step: int, num_steps: int, preview: Callable[[int], Array | None]
    ) -> None: ...

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None: ...

    def leave(self) -> None: ...


class DispatchServer:
    """A thread on rank 0 that lets another team's first rank use a dispatcher, until that team
    rejoins or leaves.
    """

    def __init__(
        self, channel: Channel, dispatcher: LocalDispatcher, *, on_loss: Callable[[], None]
    ) -> None:
        """on_loss: called when the other end is gone or this end fails, so that no team takes a new
        job.
        """
        self._channel = channel
        self._dispatcher = dispatcher
        self._on_loss = on_loss
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="team", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the team has left; raise the error that ended this thread before."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._serve(self._channel.receive()):
                pass
        # the main thread raises it when the teams rejoin, and the ranks restart
        except Exception as error:  # noqa: BLE001
            self._error = error
            self._on_loss()
            self._dispatcher.leave()

    def _give_command(self) -> Command:
        def send(command: Command) -> Command:
            self._channel.send(command)
            return command

        # the team's first rank checks the requests
        take = partial(self._dispatcher.next_command, lambda request, methods: None)
        return give_next(
            take, send, lambda outcome: self._dispatcher.generated([], outcome), rank=0
        )

    def _serve(self, message: object) -> bool:
        """Answer one message. Return whether the team goes on."""
        match message:
            case NextCommand():
                return not isinstance(self._give_command(), Rejoin)
            case StepDone():
                self._dispatcher.step_done(message.step, message.num_steps, message.previews.get)
                self._channel.send((self._dispatcher.step_signal(), self._dispatcher.rows_in_view))
            case Generated():
                self._dispatcher.generated(message.results, message.outcome)
            case Leave():
                self._on_loss()
                self._dispatcher.leave()
                return False
        return True
