"""The synchronisation modes by name: what each operator does once the synchronous steps are over.
Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from backends.plan import Exactness

Action = Literal["now", "later", "keep", "local"]
"""now: exchange and wait. later: use the values of the step before, send this step's in the
background. keep: exchange nothing, use what was last seen of the others. local: this patch's own
values only (group norm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncMode:
    """What one mode does by kind of operator."""

    halo: Action = "later"  # convolution borders
    attention: Action = "later"  # keys and values
    statistics: Action = "later"  # group norms
    is_corrected: bool = False  # stale statistics are moved by the change of the local ones
    takes_turns: bool = False  # the ranks change patches every step

    def action(self, kind: str) -> Action:
        return getattr(self, kind)

    @property
    def reads_previous_step(self) -> bool:
        """Whether a step needs what the ranks exchanged in the one before it."""
        return self not in (SYNC_MODES["full_sync"], SYNC_MODES["no_sync"])

    @property
    def exactness(self) -> Exactness:
        return "reordered" if self == SYNC_MODES["full_sync"] else "approximate"


SYNC_MODES = {
    "corrected_async_gn": SyncMode(is_corrected=True),
    "stale_gn": SyncMode(),
    "separate_gn": SyncMode(statistics="local"),
    "sync_gn": SyncMode(statistics="now"),
    "full_sync": SyncMode(halo="now", attention="now", statistics="now"),
    "no_sync": SyncMode(halo="keep", attention="keep", statistics="keep"),
    "rotate": SyncMode(halo="keep", attention="keep", statistics="keep", takes_turns=True),
}
