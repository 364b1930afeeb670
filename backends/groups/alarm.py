"""How a rank that fails tells the others, whatever they wait in: a key in the ranks' store, and a
thread on every rank that looks for it.

With gloo a closed connection tells them. With NCCL nothing does: their hosts go on, or wait for a
kernel that never ends. Imports no torch.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2


class Store(Protocol):
    """What is used of torch.distributed.Store. No call may wait for another rank: the client may be
    shared with other threads.
    """

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...


class Alarm:
    """One rank's. A mesh is known by a name that is the same on all its ranks, and new after each
    rebuild.
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
        """The mesh is closed."""
        with self._lock:
            self._watched.pop(name, None)

    def sound(self, name: str) -> None:
        """This rank failed: let all others of the mesh know, now."""
        try:
            self._store.set(f"failed/{name}", "yes")
        except (
            RuntimeError,
            OSError,
        ) as error:  # without a store the watch ends this process anyway
            logger.warning("the other ranks could not be told of a failure: %s", error)

    def _look(self) -> None:
        """As long as there is a mesh to watch."""
        while True:
            time.sleep(LOOK_EVERY_S)
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
