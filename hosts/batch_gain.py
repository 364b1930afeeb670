"""How many pictures to make in one batch: decided from measured times. Pure arithmetic; imports no torch.

A batch pays where a picture alone leaves the device idle. So it is tried: two, then twice as many, as long as each picture gets cheaper.
"""

from collections import deque
from collections.abc import Hashable
from math import inf

WORTH_BATCHING = 0.9
"""A batch pays if each of its pictures takes less than this share of the time in a batch half as large: all of them end with the last."""
NUM_TRIALS = 2
"""Before a size is judged: the first of a kind pays for caches."""
NUM_REMEMBERED = 4
NUM_KINDS = 64
"""Kinds of picture that are remembered; the one that was not made for longest is forgotten."""


class BatchGain:
    """Seconds per picture that batches of each size have needed, for each kind of picture. The best of the last few counts."""

    def __init__(self, max_batch: int) -> None:
        self._sizes = [*(2**power for power in range(max_batch.bit_length()) if 2**power < max_batch), max_batch]
        self._measured: dict[Hashable, dict[int, deque[float]]] = {}

    def learn(self, kind: Hashable, *, batch: int, seconds: float) -> None:
        """A batch of so many pictures took so long; inf if it could not be made."""
        known = self._measured.pop(kind, {})
        known.setdefault(batch, deque(maxlen=NUM_REMEMBERED)).append(seconds / batch)
        self._measured[kind] = known
        if len(self._measured) > NUM_KINDS:
            del self._measured[next(iter(self._measured))]

    def limit(self, kind: Hashable) -> int:
        """The largest batch to make of this kind: one that pays, or the next one to be tried."""
        best = 1
        for size in self._sizes[1:]:
            if not self._is_tried(kind, best):
                return best
            if not self._is_tried(kind, size):
                return size
            if self._seconds(kind, size) > WORTH_BATCHING * self._seconds(kind, best):
                return best
            best = size
        return best

    def share(self, kind: Hashable, batch: int) -> float:
        """What a picture costs in a batch of this size, as a share of what it costs alone; as far as it was measured."""
        if not self._is_tried(kind, 1):
            return 1.0
        tried = [size for size in self._sizes if size <= batch and self._is_tried(kind, size)]
        return min(self._seconds(kind, size) for size in tried) / self._seconds(kind, 1)

    def measured(self) -> dict[str, dict[int, float | None]]:
        """Kind -> size of batch -> seconds per picture; None for one that could not be made."""
        return {
            str(kind): {size: None if min(found) == inf else round(min(found), 4) for size, found in sorted(known.items())}
            for kind, known in list(self._measured.items())
        }

    def _is_tried(self, kind: Hashable, batch: int) -> bool:
        return len(self._measured.get(kind, {}).get(batch, ())) >= NUM_TRIALS

    def _seconds(self, kind: Hashable, batch: int) -> float:
        return min(self._measured[kind][batch])
