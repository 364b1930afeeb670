"""The synchronisation modes by name: what each operator does after the synchronous steps. Imports
no torch.
"""

from dataclasses import dataclass
from typing import Literal

from backends.plan import Exactness

Action = Literal["now", "later", "keep", "local"]
"""now: exchange and wait. later: use the values of the step before, and send this step's in the
background. keep: exchange nothing, and use the last known values of the other patches. local: use
this patch's own values only (group norm).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncMode:
    """What each operator does in a stale step."""

    halo: Action = "later"
    """Border rows of convolutions."""
    attention: Action = "later"
    """Keys and values of self-attention."""
    statistics: Action = "later"
    """Mean and variance of group norms."""
    is_corrected: bool = False
    """Whether stale global statistics are moved by the change of the local ones."""
    takes_turns: bool = False
    """Whether the ranks exchange patches every step."""

    def action(self, kind: str) -> Action:
        """Return the action for a kind of operator."""
        return getattr(self, kind)

    @property
    def reads_previous_step(self) -> bool:
        """Whether a step needs what the ranks exchanged in the one before it."""
        return self not in (SYNC_MODES["full_sync"], SYNC_MODES["no_sync"])

    @property
    def exactness(self) -> Exactness:
        """Return how close an image with stale steps is to one rank's."""
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
