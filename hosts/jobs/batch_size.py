"""How many images to make in one batch: decided from measured times. Pure arithmetic; imports no
torch.

A batch pays where an image alone leaves the device idle. So it is tried: two, then twice as many,
as long as each image gets cheaper.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf

WORTH_BATCHING = 0.9
"""A batch pays if each of its images takes less than this share of the time in a batch half as
large: all of them end with the last.
"""
NUM_TRIALS = 2
"""Before a size is judged: the first of a kind pays for caches."""
NUM_REMEMBERED = 4
TRIED_AGAIN_AFTER = 100
"""Images of a kind, before a size that did not pay is tried once more: another program may have
slowed its trials down.
"""
NUM_KINDS = 64
"""Kinds of image that are remembered; the one that was not made for longest is forgotten."""


@dataclass(slots=True)
class _Kind:
    """num_made: images. seconds: size of batch -> of one image, in the last few batches. made_by:
    num_made after the last of them.
    """

    num_made: int = 0
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    made_by: dict[int, int] = field(default_factory=dict)


class BatchGain:
    """Seconds per image that batches of each size have needed, for each kind of image. The best of
    the last few counts.
    """

    def __init__(self, max_batch: int) -> None:
        self._sizes = [
            *(2**power for power in range(max_batch.bit_length()) if 2**power < max_batch),
            max_batch,
        ]
        self._measured: dict[Hashable, _Kind] = {}

    def learn(self, kind: Hashable, *, batch: int, seconds: float) -> None:
        """A batch of so many images took so long; inf if it could not be made."""
        known = self._measured[kind] = self._measured.pop(kind, _Kind())
        known.num_made += batch
        known.seconds.setdefault(batch, deque(maxlen=NUM_REMEMBERED)).append(seconds / batch)
        known.made_by[batch] = known.num_made
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
                return size if self._is_due_again(kind, size) else best
            best = size
        return best

    def share(self, kind: Hashable, batch: int) -> float:
        """What an image costs in a batch of this size, as a share of what it costs alone; as far as
        it was measured.
        """
        if not self._is_tried(kind, 1):
            return 1.0
        tried = [size for size in self._sizes if size <= batch and self._is_tried(kind, size)]
        return min(self._seconds(kind, size) for size in tried) / self._seconds(kind, 1)

    def measured(self) -> dict[str, dict[int, float | None]]:
        """Kind -> size of batch -> seconds per image; None for one that could not be made."""
        return {
            str(kind): {
                size: None if min(found) == inf else round(min(found), 4)
                for size, found in sorted(known.seconds.items())
            }
            for kind, known in list(self._measured.items())
        }

    def _is_tried(self, kind: Hashable, batch: int) -> bool:
        return (
            kind in self._measured
            and len(self._measured[kind].seconds.get(batch, ())) >= NUM_TRIALS
        )

    def _is_due_again(self, kind: Hashable, batch: int) -> bool:
        """Not where it could not be made: that takes as long, and is made again one by one."""
        known = self._measured[kind]
        return (
            self._seconds(kind, batch) < inf
            and known.num_made - known.made_by[batch] >= TRIED_AGAIN_AFTER
        )

    def _seconds(self, kind: Hashable, batch: int) -> float:
        return min(self._measured[kind].seconds[batch])
