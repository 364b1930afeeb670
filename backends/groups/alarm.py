"""Failure notification between ranks: a key in their store, and a thread on every rank that polls
it.

With gloo, a closed connection reports the failure. NCCL reports nothing: the other hosts go on, or
wait for a kernel that never ends. Imports no torch.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

POLL_EVERY_S = 0.2


class Store(Protocol):
    """The part of torch.distributed.Store that is used.

    No call may wait for another rank, because other threads may share the client.
    """

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...


class Alarm:
    """Failure alarm of one rank.

    A mesh is identified by a name that is the same on all its ranks and changes with each rebuild.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._watched: dict[str, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, name: str, abort: Callable[[], None]) -> None:
        """Call `abort()` once, in another thread, when any rank sounds the alarm for this mesh."""
        with self._lock:
            self._watched[name] = abort
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="alarm", daemon=True)
                self._thread.start()

    def forget(self, name: str) -> None:
        """Stop watching a mesh that is closed."""
        with self._lock:
            self._watched.pop(name, None)

    def sound(self, name: str) -> None:
        """Tell the other ranks of the mesh that this rank failed."""
        try:
            self._store.set(f"failed/{name}", "yes")
        except (RuntimeError, OSError) as error:  # without a store the watch ends this process
            logger.warning("could not report the failure to the other ranks: %s", error)

    def _look(self) -> None:
        """Poll the store as long as there is a mesh to watch."""
        while True:
            time.sleep(POLL_EVERY_S)
            with self._lock:
                if not self._watched:
                    self._thread = None
                    return
                watched = dict(self._watched)
            for name, abort in watched.items():
                if self._is_sounded(name):
                    self.forget(name)
                    abort()

    def _is_sounded(self, name: str) -> bool:
        try:
            return self._store.check([f"failed/{name}"])
        except (RuntimeError, OSError):  # as above
            return False
