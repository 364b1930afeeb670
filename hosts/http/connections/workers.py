"""Threads for requests that are complete. As many as are needed, up to a bound."""

import contextlib
import logging
import threading
import time
from collections import deque
from typing import Any

logger = logging.getLogger(__name__)

IDLE_S = 30.0
"""How long a thread without work stays."""


class Workers:
    """Answers connections (cheroot's), each in one thread, in the order of `put`."""

    def __init__(self, name: str, *, most: int) -> None:
        """name: of the threads. most: of them at once; further connections wait."""
        self._name = name
        self._most = most
        self._changed = threading.Condition()
        self._waiting: deque[Any] = deque()
        self._threads: set[threading.Thread] = set()
        self._num_idle = 0
        self._is_stopped = False

    def put(self, connection: Any) -> None:
        """Answer this connection's request, and then give the connection back to its receiver."""
        with self._changed:
            self._waiting.append(connection)
            if len(self._waiting) <= self._num_idle:
                self._changed.notify()
            elif len(self._threads) < self._most:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.add(thread)
                thread.start()

    def stop(self, within_s: float) -> None:
        """Begin no more requests, and give those that have begun this time to end."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            threads = list(self._threads)
        deadline = time.monotonic() + within_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        try:
            while (connection := self._next()) is not None:
                try:
                    connection.communicate()
                # cheroot lets socket and TLS errors of many types through; the thread goes on
                except Exception:
                    logger.exception("a connection failed")
                finally:
                    with contextlib.suppress(OSError):
                        connection.close()
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())

    def _next(self) -> Any:
        """Return the next connection; None once this thread is not needed any more."""
        with self._changed:
            self._num_idle += 1
            try:
                self._changed.wait_for(lambda: self._waiting or self._is_stopped, IDLE_S)
                if self._is_stopped or not self._waiting:
                    self._threads.discard(threading.current_thread())
                    return None
                return self._waiting.popleft()
            finally:
                self._num_idle -= 1
