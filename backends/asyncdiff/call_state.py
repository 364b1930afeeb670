"""One generation on this rank: every evaluation of the denoiser passes through here and follows the
schedule.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
from backends.asyncdiff.units import Source, UnitHooks, leaves, num_bytes
from backends.errors import UnsupportedError
from backends.parallel.hooks import call_number, output_parts, rebuilt

CACHE = "cache"
"""In the names of arguments that a denoiser fills for later calls: then every rank runs, or has
run, all of its units.
"""
TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t")
"""Arguments of denoisers for the timestep."""
Forward = Callable[..., Any]


@dataclass(slots=True, kw_only=True)
class CallState:
    """State that is kept from step to step for the n-th denoiser call of every step. True guidance
    of flux makes two calls per step.
    """

    signature: tuple[Any, ...]
    """Shape and dtype of the denoiser's input."""
    shapes: Shapes
    """Shapes of all units' results."""
    output: Any
    """The last synchronous result of the denoiser."""
    arrivals: dict[Source, Arrival]
    """What this rank reads from other segments in its next turn."""
    made_at: int
    """Evaluation in which `arrivals` were computed."""
    timestep: Tensor | None
    """Timestep of the last evaluation, as the pipeline gave it; None if the denoiser takes none."""
    older: Values = field(default_factory=dict)
    """The same as `arrivals`, one turn earlier."""
    older_at: int | None = None
    """Evaluation in which `older` was computed."""
    ahead: "Predictions | None" = None
    """The result of the next evaluation (stride 2)."""


class Predictions:
    """The denoiser's result as one rank has it, under way to all. Some have several tensors, and
    some a list of them.
    """

    def __init__(self, output: Any, exchange: Exchange, *, source: int) -> None:
        self._output = output
        found, self._form = pytree.tree_flatten(output_parts(output))
        self._parts = [
            exchange.broadcast(part, source=source) if isinstance(part, Tensor) else part
            for part in found
        ]

    def wait(self) -> Any:
        """Return the result, of the kind that the denoiser itself returns."""
        parts = [part.wait() if isinstance(part, Arrival) else part for part in self._parts]
        return rebuilt(self._output, pytree.tree_unflatten(parts, self._form))


class Generation:
    """State of one generation. Call `evaluate` for every denoiser call and `step_done` after every
    scheduler step.
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
        """Count one evaluation, if this denoiser was called: a pipeline may have two of them."""
        self.evaluation += self._call > 0
        self._call = 0

    def last_shapes(self) -> Shapes | None:
        """Return the shapes of the first call of a step; None before there was one."""
        return next((call.shapes for call in self._calls.values()), None)

    def evaluate(
        self,
        hooks: UnitHooks,
        segments: Segments,
        forward: Forward,
        arguments: dict[str, Any],
        input_name: str,
        *,
        denoiser: nn.Module,
    ) -> Any:
        """Return the denoiser's result for these arguments, on every rank of the segment axis."""
        name = _timestep_name(arguments)
        timestep = arguments.get(name)
        if self._timesteps is None and self._role.stride == 2:
            self._timesteps = Timesteps(self._scheduler(), _required(timestep))
        number, self._call = call_number(denoiser, counted=self._call), self._call + 1
        call = self._calls.get(number)
        signature = _signature(arguments[input_name])
        phase = phase_of(
            self.evaluation, num_synchronous=self._num_synchronous, stride=self._role.stride
        )
        if any(CACHE in name and value is not None for name, value in arguments.items()):
            phase = Phase.SYNCHRONOUS
        self.has_failed = True
        if call is None or call.signature != signature or phase is Phase.SYNCHRONOUS:
            result = self._synchronous(number, signature, hooks, segments, forward, arguments)
        elif phase is Phase.STALE or call.ahead is None:
            result = self._stale(call, hooks, segments, forward, arguments)
        else:
            result = call.ahead.wait()
            call.ahead = None
        self._calls[number].timestep = timestep
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
            executor.finish()
            output = Predictions(output, self.exchange, source=self._role.num_segments - 1).wait()
            self.exchange.forget_sent()
        last = self._calls.get(number)
        keeps = last is not None and last.signature == signature
        self._calls[number] = CallState(
            signature=signature,
            shapes=executor.shapes,
            output=output,
            arrivals={source: Arrival(value) for source, value in executor.values.items()},
            made_at=self.evaluation,
            timestep=None,
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
        """Run this rank's segment on what arrived from the others. Their results of this turn are
        received meanwhile, for the next turn.
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
        name = _timestep_name(arguments)
        shifted = {} if name is None else {name: self._timestep(call, arguments[name])}
        with hooks.run_with(executor.run):
            output = forward(**{**arguments, **shifted})
        self.prediction_bytes = sum(map(num_bytes, leaves(output_parts(output))))
        prediction = Predictions(output, self.exchange, source=self._role.predictor)
        if self._role.stride == 2:
            call.ahead = Predictions(output, self.exchange, source=self._role.num_segments - 1)
        call.older, call.older_at = (
            (inbox.values(), call.made_at) if self._options["extrapolate"] else ({}, None)
        )
        call.arrivals, call.made_at = coming, self.evaluation
        return prediction.wait()

    def _timestep(self, call: CallState, current: Tensor) -> Tensor:
        """Return the timestep with which this rank's segment computes.

        Each rank works for one evaluation: the present one, or with stride 2 the next one. With
        `time_shift` it uses the timestep of the evaluation before that, in which the values that it
        reads were computed.
        """
        if self._role.is_nearer:
            return call.timestep if self._options["time_shift"] else current
        if self._options["time_shift"]:
            return current
        return self._timesteps.after(self.evaluation, current)

    def _extrapolation(self, call: CallState) -> Callable[[Source, Tensor], Tensor] | None:
        """Return the extrapolation along the line through the last two turns to this evaluation."""
        if not self._options["extrapolate"] or call.older_at is None:
            return None
        reach = (self.evaluation - call.made_at) / (call.made_at - call.older_at)
        return lambda source, value: torch.lerp(call.older[source], value, 1.0 + reach)


def _timestep_name(arguments: Mapping[str, Any]) -> str | None:
    return next((name for name in TIMESTEPS if name in arguments), None)


def _required(timestep: Tensor | None) -> Tensor:
    if timestep is None:
        raise UnsupportedError(
            "stride=2 is not available: this denoiser takes no timestep, so it cannot compute one "
            "step ahead. Use stride=1."
        )
    return timestep


def _signature(model_input: Tensor) -> tuple[Any, ...]:
    return (tuple(model_input.shape), model_input.dtype)
