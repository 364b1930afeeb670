"""Values of the other patches that are kept between steps: buffers, and the messages that refill
them in the background.

One CallBuffers belongs to one call of one network within a step. Each operator that does not
exchange at once has a slot with the last known value of every patch, numbered in the order of the
operators. Slots are packed into a few messages, and those of all group norms into one, so that one
pass corrects them all. A message starts when its last operator of the step has run, and is awaited
when its first operator of the next step needs it. Source: DistriFusion, arXiv:2402.19481, section
4.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from backends.distrifuser.modes import SyncMode
from backends.groups.collectives import AsyncAllToAll, gather_pieces
from backends.groups.mesh import Axis, CommStats
from backends.groups.patch_exchange import Exchange, Kind, combine

NUM_MESSAGES = 8  # per step: enough that nearly all of the sending overlaps with computing
ALIGNMENT = 16  # bytes: every dtype can be viewed there
DRAIN_TIMEOUT = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class Spec:
    """Kind, dtype and shape (one per patch) of an operator's value."""

    kind: Kind
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]

    def num_bytes(self, patch: int) -> int:
        """Return the size of one patch's value."""
        return math.prod(self.shapes[patch]) * self.dtype.itemsize


class Slot:
    """The last known value of every patch for one operator."""

    def __init__(self, spec: Spec, pieces: list[Tensor]) -> None:
        self.spec = spec
        self.pieces = pieces
        self.older: list[Tensor | None] = [None] * len(pieces)
        """Those of one step earlier; after `Message.extrapolate`, those expected for this step."""
        self.message: Message | None = None
        self.shares: tuple[float, ...] = ()
        """Of a group norm: each patch's fraction of the image."""


class Message:
    """Slots that travel together: one byte buffer to send, one to receive."""

    def __init__(
        self, slots: Sequence[Slot], *, axis: Axis, traffic: CommStats, keeps_older: bool
    ) -> None:
        """Move the slots' present values, of one dtype, into the buffers of this message."""
        self._axis, self._traffic = axis, traffic
        self.sizes = [
            sum(_aligned(slot.spec.num_bytes(patch)) for slot in slots)
            for patch in range(axis.size)
        ]
        device = slots[0].pieces[0].device
        self._sent = torch.empty(self.sizes[axis.rank], dtype=torch.uint8, device=device)
        self._received = torch.empty(
            sum(self.sizes) - self.sizes[axis.rank], dtype=torch.uint8, device=device
        )
        self._older = torch.empty_like(self._received) if keeps_older else None
        self._transfer: AsyncAllToAll | None = None
        self.is_extrapolated = False
        offset = 0
        for patch in range(axis.size):
            buffer, start = (self._sent, 0) if patch == axis.rank else (self._received, offset)
            _place(slots, patch, buffer, start, self._older if patch != axis.rank else None)
            offset += 0 if patch == axis.rank else self.sizes[patch]
        self.last = slots[-1]
        for slot in slots:
            slot.message = self

    @property
    def num_bytes(self) -> int:
        """Return the memory of the buffers."""
        return sum(
            buffer.numel()
            for buffer in (self._sent, self._received, self._older)
            if buffer is not None
        )

    def start(self) -> None:
        """Send this rank's values of the step that has just been computed. The received values are
        replaced by those of the other patches.
        """
        self.remember()
        self._transfer = AsyncAllToAll(
            self._sent, self._received, self.sizes, axis=self._axis, is_late=True
        )
        self._traffic.add(self._sent, peers=self._axis.size - 1)

    def remember(self) -> None:
        """Keep the received values as the older ones before they are replaced."""
        self.is_extrapolated = False
        if self._older is not None:
            self._older.copy_(self._received)

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait until the values of the last `start` have arrived, if there was one."""
        if self._transfer is not None:
            transfer, self._transfer = self._transfer, None
            started = time.perf_counter()
            transfer.wait(timeout)
            self._traffic.wait_s += time.perf_counter() - started

    def extrapolate(self) -> None:
        """Replace the older values by those expected for this step, on the line through both: once
        a step, all values at once.
        """
        if not self.is_extrapolated:
            dtype = self.last.spec.dtype
            self._older.view(dtype).lerp_(self._received.view(dtype), 2.0)
            self.is_extrapolated = True


class CallBuffers(Exchange):
    """The exchange of one call of one network, from step to step."""

    def __init__(self, mode: SyncMode, *, keeps_older: bool, traffic: CommStats) -> None:
        """keeps_older: keep the values of two steps, so that a generation can extrapolate."""
        self._mode = mode
        self._keeps_older = keeps_older
        self._extrapolates = False
        self._traffic = traffic
        self._slots: list[Slot] = []
        self._messages: list[Message] = []
        self._geometry: object = None
        self._num_steps = 0
        self._complete: Message | None = None
        self._norms: list[list[int]] = []
        self._corrections: dict[int, Tensor] = {}

    def is_fresh(self, is_asked: bool, *, geometry: object) -> bool:
        """Return whether the next call must exchange everything at once: because it is asked to, or
        because no older values fit.

        geometry: what must be the same in two steps for the older values to fit.
        """
        if geometry != self._geometry:
            self.reset()
            self._geometry = geometry
        return is_asked or self._num_steps == 0

    def open(self, *, is_fresh: bool, patch: int, axis: Axis, extrapolates: bool = False) -> None:
        """Begin a call for this patch."""
        self._extrapolates = extrapolates and self._keeps_older
        self._is_fresh, self._patch, self._axis = is_fresh, patch, axis
        self._index = 0
        self._held: list[Slot] | None = None
        self._corrections.clear()

    def close(self) -> None:
        """End the call: start the last message, and create buffers if the operators were new.
        RuntimeError if other operators ran than in the step before.
        """
        self._start_complete()
        self._num_steps += 1
        if not self._is_fresh and self._index < len(self._slots):
            raise RuntimeError(
                f"{self._index} operators ran, but {len(self._slots)} did in the step before: the "
                "network changed"
            )
        if self._is_fresh and (self._held is not None or self._index < len(self._slots)):
            self._lay_out((self._held or self._slots)[: self._index])

    def reset(self) -> None:
        """Forget the values and keep the buffers."""
        self.drain()
        self._num_steps = 0

    def drain(self) -> None:
        """Wait for all that is under way; RuntimeError afterwards, if a peer did not answer."""
        self._complete = None
        errors = []
        for message in self._messages:
            try:
                message.wait(DRAIN_TIMEOUT)
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def gather(self, kind: Kind, own: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the value of every patch: this step's, or in a stale step those of the step
        before.
        """
        action = self._mode.action(kind)
        if action in ("now", "local") or self._is_fresh:
            self._start_complete()
            pieces = gather_pieces(own, shapes, axis=self._axis, traffic=self._traffic)
            if action in ("later", "keep"):
                self._store(Spec(kind, own.dtype, tuple(tuple(shape) for shape in shapes)), pieces)
            return pieces
        slot = self._next_slot(kind, own)
        pieces = self._expected(slot)
        self._replace_own(slot, own)
        pieces[self._patch] = own
        return pieces

    def moments(self, own: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the mean and variance (N, G) of the whole image; in stale steps as the mode
        says. Source: DistriFusion, arXiv:2402.19481, section 4 (corrected asynchronous group
        norm).

        Corrected statistics start from the last step's values also where everything else is
        extrapolated. If they started from extrapolated ones, the change of the other patches would
        count twice. Extrapolated statistics without a correction were further from the exact ones.
        """
        if self._is_fresh or self._mode.statistics == "now":
            index = self._index
            result = super().moments(own, shares)
            if self._index > index:  # stored
                (self._held or self._slots)[index].shares = tuple(shares)
            return result
        if self._mode.statistics == "local":
            return own[0], own[1]
        if not self._mode.is_corrected:
            return _or_own(
                combine(self.gather("statistics", own, [own.shape] * len(shares)), shares), own
            )
        index, slot = self._index, self._next_slot("statistics", own)
        if not self._corrections:
            for norms in self._norms:
                alike = corrections([self._slots[norm] for norm in norms], self._patch)
                self._corrections.update(zip(norms, alike, strict=True))
        result = corrected(self._corrections[index], own)
        self._replace_own(slot, own)
        return result

    @property
    def _can_extrapolate(self) -> bool:
        """Return whether two earlier steps are known."""
        return self._extrapolates and self._num_steps >= 2

    @property
    def num_bytes(self) -> int:
        """Return the memory of the buffers."""
        kept = [piece for slot in self._slots if slot.message is None for piece in slot.pieces]
        return sum(message.num_bytes for message in self._messages) + sum(
            piece.numel() * piece.element_size() for piece in kept
        )

    def _store(self, spec: Spec, pieces: list[Tensor]) -> None:
        """Keep this step's values, in the buffers if they fit."""
        index, self._index = self._index, self._index + 1
        if self._held is None and index < len(self._slots) and self._slots[index].spec == spec:
            self._overwrite(self._slots[index], pieces)
            return
        if self._held is None:
            self._held = self._slots[:index]
        self._held.append(Slot(spec, [piece.clone() for piece in pieces]))

    def _overwrite(self, slot: Slot, pieces: list[Tensor]) -> None:
        if slot.message is not None:
            slot.message.wait()
            slot.message.is_extrapolated = False
        for piece, old, older in zip(pieces, slot.pieces, slot.older, strict=True):
            if older is not None:
                older.copy_(old)
            old.copy_(piece)

    def _lay_out(self, slots: list[Slot]) -> None:
        """Create buffers for these operators: a few messages for values that are sent later, single
        tensors for values that are only kept. Note which group norms are corrected together.
        """
        self._slots = slots
        later = [slot for slot in slots if self._mode.action(slot.spec.kind) == "later"]
        self._messages = [
            Message(group, axis=self._axis, traffic=self._traffic, keeps_older=self._keeps_older)
            for group in _groups(later)
        ]
        alike: dict[tuple[Spec, tuple[float, ...]], list[int]] = {}
        for index, slot in enumerate(slots):
            if slot.spec.kind == "statistics":
                alike.setdefault((slot.spec, slot.shares), []).append(index)
        self._norms = list(alike.values())

    def _next_slot(self, kind: Kind, own: Tensor) -> Slot:
        """Return the slot of the present operator with its values of the step before. RuntimeError
        if another operator ran there.
        """
        self._start_complete()
        slot = self._slots[self._index] if self._index < len(self._slots) else None
        if (
            slot is None
            or slot.spec.kind != kind
            or slot.spec.shapes[self._patch] != tuple(own.shape)
        ):
            raise RuntimeError(
                f"operator {self._index} ({kind}, {tuple(own.shape)}) was not there in the step "
                "before: the network changed"
            )
        self._index += 1
        if slot.message is not None:
            slot.message.wait()
        return slot

    def _expected(self, slot: Slot) -> list[Tensor]:
        """Return the other patches' values: those of the step before, or extrapolated from the last
        two steps.
        """
        if not self._can_extrapolate or slot.message is None:
            return list(slot.pieces)
        slot.message.extrapolate()
        return [
            piece if older is None else older
            for piece, older in zip(slot.pieces, slot.older, strict=True)
        ]

    def _replace_own(self, slot: Slot, own: Tensor) -> None:
        slot.pieces[self._patch].copy_(own)
        if slot.message is not None and slot is slot.message.last:
            self._complete = slot.message

    def _start_complete(self) -> None:
        """Start the message whose last operator has run. Not earlier, because until then its
        received values are in use.
        """
        if self._complete is not None:
            self._complete.start()
            self._complete = None


def corrections(slots: Sequence[Slot], patch: int) -> Sequence[Tensor]:
    """Return for each of these group norms (2, N, G) what its own new moments are added to: the
    mean and mean of squares of the whole image, less those of this patch, in the step before.

    slots: of one shape and the same shares. All at once, because each alone takes twenty launches.
    """
    patches = range(len(slots[0].pieces))
    pieces = [torch.stack([slot.pieces[one] for slot in slots], dim=1) for one in patches]
    mean, var = combine(pieces, slots[0].shares)
    own_mean, own_var = pieces[patch]
    square = (var + mean**2) - (own_var + own_mean**2)
    return torch.stack((mean - own_mean, square)).unbind(1)


def corrected(correction: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance (N, G) of the whole image: the stale ones, moved by the change
    of the local ones, in means and means of squares.

    own: (2, N, G), this patch's mean and variance. A negative variance is replaced by the local
    one.
    """
    mean = correction[0] + own[0]
    var = correction[1] + own[1] + own[0] ** 2 - mean**2
    return _or_own((mean, var), own)


def _or_own(moments: tuple[Tensor, Tensor], own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments, with this patch's variance where theirs is negative, which is impossible
    for a whole image.
    """
    return moments[0], torch.where(moments[1] < 0, own[1], moments[1])


def _groups(slots: list[Slot]) -> list[list[Slot]]:
    """Divide the slots into those of each message, the same on all ranks: one for all statistics,
    and for each dtype NUM_MESSAGES of about equal size.
    """
    kinds: dict[tuple[bool, torch.dtype], list[Slot]] = {}
    for slot in slots:
        kinds.setdefault((slot.spec.kind == "statistics", slot.spec.dtype), []).append(slot)
    return [
        group
        for (is_norm, _), alike in kinds.items()
        for group in ([alike] if is_norm else _of_equal_size(alike))
    ]


def _of_equal_size(slots: list[Slot]) -> list[list[Slot]]:
    sizes = [
        sum(slot.spec.num_bytes(patch) for patch in range(len(slot.spec.shapes))) for slot in slots
    ]
    total = sum(sizes)
    groups: list[list[Slot]] = []
    taken = 0
    for slot, size in zip(slots, sizes, strict=True):
        if not groups or taken * NUM_MESSAGES >= total * len(groups):
            groups.append([])
        groups[-1].append(slot)
        taken += size
    return groups


def _place(
    slots: Sequence[Slot], patch: int, buffer: Tensor, offset: int, older: Tensor | None
) -> None:
    """Make the slots' values of this patch views of `buffer`, one after the other from `offset`."""
    for slot in slots:
        size = slot.spec.num_bytes(patch)
        view = _view(buffer, offset, slot.spec, patch)
        slot.pieces[patch] = view.copy_(slot.pieces[patch])
        slot.older[patch] = (
            None if older is None else _view(older, offset, slot.spec, patch).copy_(view)
        )
        offset += _aligned(size)


def _view(buffer: Tensor, offset: int, spec: Spec, patch: int) -> Tensor:
    return buffer[offset : offset + spec.num_bytes(patch)].view(spec.dtype).view(spec.shapes[patch])


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
