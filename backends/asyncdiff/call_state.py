"""One generation on this rank: every evaluation of the denoiser goes through here and follows the
schedule.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.asyncdiff.exchange import Arrival, Exchange
from backends.asyncdiff.executors import (
    Inbox,
    SegmentExecutor,
    SequentialExecutor,
    Shapes,
    SynchronousExecutor,
    Values,
)
from backends.asyncdiff.schedule import Phase, RankRole, phase_of
from backends.asyncdiff.segments import Segments
from backends.asyncdiff.timesteps import Timesteps
from backends.asyncdiff.units import Source, UnitHooks, num_bytes

Forward = Callable[..., Any]


@dataclass(slots=True, kw_only=True)
class CallState:
    """What is kept from one step to the next for the n-th denoiser call of every step (true
    guidance of flux makes two calls a step).
    """

    signature: tuple[Any, ...]  # of the input; another one needs a synchronous step
    shapes: Shapes
    output: Any  # of the denoiser
    arrivals: dict[Source, Arrival]  # what this rank reads of other segments in its next turn
    made_at: int  # the evaluation that computed them
    timestep: Tensor  # of the last evaluation, as the pipeline passed it
    older: Values = field(default_factory=dict)  # the arrivals of one turn before
    older_at: int | None = None
    ahead: Arrival | None = None  # the prediction of the next evaluation (stride 2)


class Generation:
    """State of one generation. `evaluate` is called for every denoiser call, `step_done` after
    every scheduler step.
    """

    def __init__(
        self,
        *,
        role: RankRole,
        options: Mapping[str, Any],
        exchange: Exchange,
        num_synchronous: int,
        scheduler: Callable[[], Any],
    ) -> None:
        self.exchange = exchange
        self.evaluation = 0
        self.num_stale = 0
        self.prediction_bytes = 0
        self.has_failed = False
        self._role = role
        self._options = options
        self._num_synchronous = num_synchronous
        self._scheduler = scheduler
        self._timesteps: Timesteps | None = None
        self._calls: dict[int, CallState] = {}
        self._call = 0

    def step_done(self) -> None:
        self.evaluation += 1
        self._call = 0

    def last_shapes(self) -> Shapes | None:
        return next((call.shapes for call in self._calls.values()), None)

    def evaluate(
        self,
        hooks: UnitHooks,
        segments: Segments,
        forward: Forward,
        arguments: dict[str, Any],
        input_name: str,
    ) -> Any:
        """The denoiser's result for these arguments, on every rank of the segment axis."""
        if self._timesteps is None and self._role.stride == 2:
            self._timesteps = Timesteps(self._scheduler(), arguments["timestep"])
        number, self._call = self._call, self._call + 1
        call = self._calls.get(number)
        signature = _signature(arguments[input_name])
        phase = phase_of(
            self.evaluation, num_synchronous=self._num_synchronous, stride=self._role.stride
        )
        self.has_failed = True
        if call is None or call.signature != signature or phase is Phase.SYNCHRONOUS:
            result = self._synchronous(number, signature, hooks, segments, forward, arguments)
        elif phase is Phase.STALE or call.ahead is None:
            result = self._stale(call, hooks, segments, forward, arguments)
        else:
            result = _with_prediction(call.output, call.ahead.wait())
            call.ahead = None
        self._calls[number].timestep = arguments["timestep"]
        self.has_failed = False
        return result

    def _synchronous(
        self,
        number: int,
        signature: tuple[Any, ...],
        hooks: UnitHooks,
        segments: Segments,
        forward: Forward,
        arguments: dict[str, Any],
    ) -> Any:
        is_sharded = self._options["shard_weights"]
        executor = (
            SequentialExecutor(segments, self._role, self.exchange)
            if is_sharded
            else SynchronousExecutor(segments, self._role)
        )
        with hooks.run_with(executor.run):
            output = forward(**arguments)
        if is_sharded:
            prediction = self.exchange.broadcast(output[0], source=self._role.num_segments - 1)
            output = _with_prediction(output, prediction.wait())
            self.exchange.forget_sent()
        last = self._calls.get(number)
        keeps = last is not None and last.signature == signature
        self._calls[number] = CallState(
            signature=signature,
            shapes=executor.shapes,
            output=output,
            arrivals={source: Arrival(value) for source, value in executor.values.items()},
            made_at=self.evaluation,
            timestep=arguments["timestep"],
            older={source: arrival.wait() for source, arrival in last.arrivals.items()}
            if keeps
            else {},
            older_at=last.made_at if keeps else None,
        )
        return output

    def _stale(
        self,
        call: CallState,
        hooks: UnitHooks,
        segments: Segments,
        forward: Forward,
        arguments: dict[str, Any],
    ) -> Any:
        """This rank's segment, on what arrived from the others; theirs of this turn are received
        meanwhile, for the next.
        """
        self.num_stale += 1
        inbox = Inbox(call.arrivals, self._extrapolation(call))
        coming = {
            source: self.exchange.receive(
                call.shapes.of(source), source=segments.segment_of(source[0])
            )
            for source in call.arrivals
        }
        self.exchange.forget_sent()
        executor = SegmentExecutor(
            segments, self._role, shapes=call.shapes, inbox=inbox, exchange=self.exchange
        )
        with hooks.run_with(executor.run):
            output = forward(
                **{**arguments, "timestep": self._timestep(call, arguments["timestep"])}
            )
        self.prediction_bytes = num_bytes(output[0])
        prediction = self.exchange.broadcast(output[0], source=self._role.predictor)
        if self._role.stride == 2:
            call.ahead = self.exchange.broadcast(output[0], source=self._role.num_segments - 1)
        call.older, call.older_at = (
            (inbox.values(), call.made_at) if self._options["extrapolate"] else ({}, None)
        )
        call.arrivals, call.made_at = coming, self.evaluation
        return _with_prediction(output, prediction.wait())

    def _timestep(self, call: CallState, current: Tensor) -> Tensor:
        """The timestep that this rank's segment computes with.

        Each rank works for one evaluation: the one at hand, or with stride 2 the one after it.
        `time_shift` takes the timestep of the evaluation before that one, which is when the values
        that the segment reads were made.
        """
        if self._role.is_nearer:
            return call.timestep if self._options["time_shift"] else current
        if self._options["time_shift"]:
            return current
        return self._timesteps.after(self.evaluation, current)

    def _extrapolation(self, call: CallState) -> Callable[[Source, Tensor], Tensor] | None:
        """Along the line through the last two turns, to this evaluation."""
        if not self._options["extrapolate"] or call.older_at is None:
            return None
        reach = (self.evaluation - call.made_at) / (call.made_at - call.older_at)
        return lambda source, value: torch.lerp(call.older[source], value, 1.0 + reach)


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    """The denoiser's own kind of result, with this prediction in it."""
    return (
        (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)
    )


def _signature(model_input: Tensor) -> tuple[Any, ...]:
    return (tuple(model_input.shape), model_input.dtype)
