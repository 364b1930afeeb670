"""What a unit's call does on this rank: run and keep the result, run and send it, or be skipped and
return what arrived.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backends.asyncdiff.exchange import Arrival, Exchange
from backends.asyncdiff.schedule import RankRole
from backends.asyncdiff.segments import Segments
from backends.asyncdiff.units import Source, num_bytes

Values = dict[Source, Tensor]


class Shapes:
    """The shape of each unit's last result, without the numbers, so that a stand-in can be built.

    A stand-in is a zero of the right shape and dtype that takes no memory (all strides are 0).
    """

    def __init__(self, *, copies: bool = False) -> None:
        """copies: whether the denoiser changes in place what units return."""
        self._copies = copies
        self._forms: dict[int, tuple[list[Any], Any]] = {}

    def remember(self, unit: int, result: Any) -> None:
        """Store the shapes of a unit's result."""
        leaves, form = pytree.tree_flatten(result)
        self._forms[unit] = (
            [_stand_in(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            form,
        )

    def fill(self, unit: int, value_of: Callable[[Source], Tensor | None]) -> Any:
        """Return a result of this unit, made of known values where there are any, else of
        stand-ins. Where results are changed in place, both are copies.
        """
        leaves, form = self._forms[unit]
        known = [value_of((unit, position)) for position in range(len(leaves))]
        if self._copies:
            known = [None if value is None else value.clone() for value in known]
            leaves = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(
            [leaf if value is None else value for leaf, value in zip(leaves, known, strict=True)],
            form,
        )

    def num_bytes(self) -> int:
        """Return the bytes of everything that all units return in one evaluation."""
        return sum(num_bytes(leaf) for leaves, _ in self._forms.values() for leaf in leaves)

    def traffic(self, segments: Segments, role: RankRole) -> int:
        """Return the bytes that all ranks together send across the cuts in one turn."""
        wanted = [
            (source, len(role.ranks_of(segment)))
            for segment in range(segments.num_segments)
            for source in segments.imports(segment)
        ]
        return sum(num_bytes(self.of(source)) * copies for source, copies in wanted)

    def take(self, units: range, forms: list[Any], device: torch.device) -> None:
        """Store the shapes of these units, as another rank's `give` returned them."""
        for unit, given in zip(units, forms, strict=True):
            if given is None:
                continue  # it did not run
            leaves, form = given
            self._forms[unit] = (
                [_stand_in(leaf, device) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
                form,
            )

    def give(self, units: range) -> list[Any]:
        """Return the shapes of these units for another rank's `take`, None for those that did not
        run, without a device: a pickled tensor would be on the sender's there too.
        """

        def without_device(leaf: Any) -> Any:
            return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

        return [
            ([without_device(leaf) for leaf in self._forms[unit][0]], self._forms[unit][1])
            if unit in self
            else None
            for unit in units
        ]

    def __contains__(self, unit: int) -> bool:
        return unit in self._forms

    def of(self, source: Source) -> Tensor:
        """Return the stand-in of one tensor."""
        return self._forms[source[0]][0][source[1]]


class Inbox:
    """The tensors of other segments that this rank reads in one evaluation. Each is awaited when it
    is first used.
    """

    def __init__(
        self,
        arrivals: Mapping[Source, Arrival],
        extrapolate: Callable[[Source, Tensor], Tensor] | None = None,
    ) -> None:
        self._arrivals = arrivals
        self._extrapolate = extrapolate
        self._used: Values = {}

    def get(self, source: Source) -> Tensor | None:
        """Return the tensor, extrapolated if that is on; None if this rank does not receive it.

        Sizes, masks and other whole numbers have no line on which to go on.
        """
        if source not in self._arrivals:
            return None
        if source not in self._used:
            value = self._arrivals[source].wait()
            goes_on = self._extrapolate is not None and value.is_floating_point()
            self._used[source] = self._extrapolate(source, value) if goes_on else value
        return self._used[source]

    def values(self) -> Values:
        """Return the tensors as they arrived, without extrapolation."""
        return {source: arrival.wait() for source, arrival in self._arrivals.items()}


class SynchronousExecutor:
    """Run every unit, and keep what the first stale evaluation will read."""

    def __init__(self, segments: Segments, role: RankRole) -> None:
        self._copies = segments.layout.has_changes
        self.shapes = Shapes(copies=self._copies)
        self.values: Values = {}
        self._index = _index(segments)
        self._imports = frozenset(segments.imports(role.segment))

    def run(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the unit and store its shapes."""
        result = forward(*args, **kwargs)
        unit = self._index.get(name)
        if unit is not None:
            self.shapes.remember(unit, result)
            for position, leaf in enumerate(pytree.tree_leaves(result)):
                if (unit, position) in self._imports:
                    self.values[unit, position] = leaf.clone() if self._copies else leaf
        return result


class SegmentExecutor:
    """Run this rank's units and send what other ranks read of them. All other units return what
    arrived from their ranks.
    """

    def __init__(
        self,
        segments: Segments,
        role: RankRole,
        *,
        shapes: Shapes,
        inbox: Inbox,
        exchange: Exchange,
    ) -> None:
        self._index = _index(segments)
        self._copies = segments.layout.has_changes
        self._mine = segments.units(role.segment)
        self._readers = readers(segments, role) if role.is_sender else {}
        self._shapes = shapes
        self._inbox = inbox
        self._exchange = exchange

    def run(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the unit if it is this rank's, else return what arrived."""
        unit = self._index.get(name)
        if unit is None:
            return forward(*args, **kwargs)
        if unit not in self._mine:
            return self._shapes.fill(unit, self._inbox.get)
        result = forward(*args, **kwargs)
        for position, leaf in enumerate(pytree.tree_leaves(result)):
            if to := self._readers.get((unit, position), ()):
                self._exchange.send(leaf.clone() if self._copies else leaf, to=to)
        return result


class SequentialExecutor:
    """A synchronous evaluation where each rank has the weights of its own segment only: the ranks
    work one after the other.

    When a segment is done, its rank sends the shapes of its units' results to all others, and the
    tensors to the ranks that read them.
    """

    def __init__(self, segments: Segments, role: RankRole, exchange: Exchange) -> None:
        self._copies = segments.layout.has_changes
        self.shapes = Shapes(copies=self._copies)
        self.values: Values = {}
        self._segments = segments
        self._index = _index(segments)
        self._role = role
        self._readers = readers(segments, role) if role.is_sender else {}
        self._imports = segments.imports(role.segment)
        self._exchange = exchange
        self._num_done = 0
        self._results: list[tuple[Any, tuple[int, ...]]] = []

    def run(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the unit if it is this rank's, else wait for its segment and return what arrived."""
        unit = self._index.get(name)
        if unit is None:
            return forward(*args, **kwargs)
        segment = self._segments.segment_of(unit)
        if segment == self._role.segment:
            result = self._compute(unit, forward(*args, **kwargs))
        else:
            if segment == self._num_done:
                self._receive_from(segment)
            result = self.shapes.fill(unit, self.values.get)
        return result

    def _compute(self, unit: int, result: Any) -> Any:
        self.shapes.remember(unit, result)
        self._results += [
            (leaf.clone() if self._copies else leaf, to)
            for position, leaf in enumerate(pytree.tree_leaves(result))
            if (to := self._readers.get((unit, position), ()))
        ]
        if unit == self._segments.units(self._role.segment)[-1]:
            self._receive_from(self._role.segment)
        return result

    def finish(self) -> None:
        """Finish the segments of which a call did not run the last unit: one that fills a cache may
        end before.
        """
        while self._num_done < self._segments.num_segments:
            self._receive_from(self._num_done)

    def _receive_from(self, segment: int) -> None:
        """Share the shapes of a finished segment with all ranks, send what the others read, and
        receive the tensors that this rank's segment reads.
        """
        units = self._segments.units(segment)
        mine = self.shapes.give(units) if segment == self._role.segment else None
        self.shapes.take(units, self._exchange.share(mine, source=segment), self._exchange.device)
        arrivals = [
            (source, self._exchange.receive(self.shapes.of(source), source=segment))
            for source in self._imports
            if source[0] in units and source[0] in self.shapes
        ]
        # not before: on a GPU the readers, which wait for the shapes first, could not receive them
        while segment == self._role.segment and self._results:
            leaf, readers_of = self._results.pop(0)
            self._exchange.send(leaf, to=readers_of)
        self.values |= {source: arrival.wait() for source, arrival in arrivals}
        self._num_done += 1


def readers(segments: Segments, role: RankRole) -> dict[Source, tuple[int, ...]]:
    """Return, for each tensor of this rank's segment that other segments read, the ranks of the
    axis that need it.
    """
    mine = segments.units(role.segment)
    found: dict[Source, tuple[int, ...]] = {}
    for segment in range(role.segment + 1, segments.num_segments):
        for source in segments.imports(segment):
            if source[0] in mine:
                found[source] = found.get(source, ()) + role.ranks_of(segment)
    return found


def _index(segments: Segments) -> dict[str, int]:
    return {unit.name: index for index, unit in enumerate(segments.layout.units)}


def _stand_in(leaf: Tensor, device: torch.device | None = None) -> Tensor:
    return torch.zeros((), dtype=leaf.dtype, device=device or leaf.device).expand(leaf.shape)
