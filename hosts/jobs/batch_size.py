"""How many images to generate in one batch, decided from measured times. Pure arithmetic; imports
no torch.

A batch pays if a single image leaves the device partly idle. So batches are tried: two images, then
twice as many, as long as the time per image falls.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf

WORTH_BATCHING = 0.9
"""A batch pays if the time per image is below this share of that in a batch half as large. The rest
makes up for the wait: all images of a batch end with the last.
"""
NUM_TRIALS = 2
"""Batches of one size before the size is judged: the first one fills caches."""
NUM_REMEMBERED = 4
"""Batches of one size whose times are kept."""
TRIED_AGAIN_AFTER = 100
"""Images of a kind until a size that did not pay is tried once more: another program may have
slowed its trials down.
"""
NUM_KINDS = 64
"""Kinds of image that are remembered. Beyond that the least recent one is forgotten."""


@dataclass(slots=True)
class _Kind:
    num_made: int = 0
    """Images of this kind so far."""
    seconds: dict[int, deque[float]] = field(default_factory=dict)
    """Batch size -> seconds per image in the last few batches."""
    made_by: dict[int, int] = field(default_factory=dict)
    """Batch size -> `num_made` after the last such batch."""


class BatchGain:
    """Measured seconds per image for each kind of image and batch size. The best of the last few
    batches counts.
    """

    def __init__(self, max_batch: int) -> None:
        self._sizes = [
            *(2**power for power in range(max_batch.bit_length()) if 2**power < max_batch),
            max_batch,
        ]
        self._measured: dict[Hashable, _Kind] = {}

    def learn(self, kind: Hashable, *, batch: int, seconds: float) -> None:
        """Record the time of one batch of `batch` images; inf if it failed."""
        known = self._measured[kind] = self._measured.pop(kind, _Kind())
        known.num_made += batch
        known.seconds.setdefault(batch, deque(maxlen=NUM_REMEMBERED)).append(seconds / batch)
        known.made_by[batch] = known.num_made
        if len(self._measured) > NUM_KINDS:
            del self._measured[next(iter(self._measured))]

    def limit(self, kind: Hashable) -> int:
        """Return the largest batch to form of this kind: one that pays, or the next one to try."""
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
        """Return the time per image in a batch of this size as a share of that of a single image;
        1 if it was not measured.
        """
        if not self._is_tried(kind, 1):
            return 1.0
        tried = [size for size in self._sizes if size <= batch and self._is_tried(kind, size)]
        return min(self._seconds(kind, size) for size in tried) / self._seconds(kind, 1)

    def measured(self) -> dict[str, dict[int, float | None]]:
        """Return kind -> batch size -> seconds per image, or None if the batch failed."""
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
        """Return whether to try a size again. Never one that failed: its images had to run once
        more, singly.
        """
        known = self._measured[kind]
        return (
            self._seconds(kind, batch) < inf
            and known.num_made - known.made_by[batch] >= TRIED_AGAIN_AFTER
        )

    def _seconds(self, kind: Hashable, batch: int) -> float:
        return min(self._measured[kind].seconds[batch])
