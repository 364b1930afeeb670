"""The thread that holds every connection on which no thread works: it receives requests until they
are complete, and waits for clients to close after their answers.

So a client that sends nothing, or slowly, or never closes, holds a descriptor and no thread.
"""

import contextlib
import logging
import resource
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hosts.http.connections.incoming import Incoming, Refusal, answer

logger = logging.getLogger(__name__)

LINGER_S = 2.0
MAX_CONNECTIONS = 1024
"""Or half of what the process may open, if that is less."""
ADDRESS_SHARE = 0.75
"""Fraction of the connections that one client address may have. All clients of a proxy have one."""
LEAST_HELD = 256 * 2**20
"""Bytes of bodies that may be held at once, or four of the largest, if that is more."""
FREE_BYTES = 64 * 1024
"""Bodies up to this size are received whatever is held."""
READ_SIZE = 256 * 1024
MAX_TURNED_AWAY = 128
"""Connections beyond MAX_CONNECTIONS that linger after their 503; further ones are reset."""
LOOK_EVERY_S = 0.25
SEND_WITHIN_S = 30.0
"""How long a client may read nothing of its answer."""
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
"""An interim response, which every HTTP/1.1 client skips."""
BUSY = Refusal(
    "503 Service Unavailable",
    "this host has as many connections as it allows. Try again in a few seconds.",
)
FULL = Refusal(
    "503 Service Unavailable",
    "this host holds as many bytes of other requests as it allows. Try again in a few seconds.",
)
LATE = Refusal("408 Request Timeout", "the request did not arrive in time. Send it again.")
_RESET, _ORDERLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


@dataclass(slots=True)
class _Held:
    """Where a connection is: its request arrives, or a thread works on it, or it lingers."""

    incoming: Incoming | None
    """None once a thread has the request, or it was refused."""
    lingers_until_s: float | None = None
    num_bytes: int = 0
    """Of the body, until the answer is written."""


class Receiver:
    """Connections from their beginning (`put`) to their end (after `linger`).

    A connection has `socket`, `remote_addr`, `begin(incoming)` and `finish()`, which closes it.
    Everything but the three public methods runs in the receiver's own thread.
    """

    def __init__(
        self, *, deliver: Callable[[Any], None], max_body: int, admits: Callable[[str], bool]
    ) -> None:
        """deliver: called with each connection whose request is complete. max_body: bytes. admits:
        as in Incoming.
        """
        self._deliver = deliver
        self._max_body = max_body
        self._admits = admits
        self._most_bytes = max(LEAST_HELD, 4 * max_body)
        self._num_bytes = 0
        self._most = MAX_CONNECTIONS
        self._open: dict[Any, _Held] = {}
        """All connections, the oldest first."""
        self._of_address: Counter[str] = Counter()
        self._turned_away: dict[Any, float] = {}
        """Those with their 503, and until when they linger. They count for nothing else."""
        self._told: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="http-receiver", daemon=True)

    def start(self) -> None:
        self._most = min(MAX_CONNECTIONS, _num_descriptors() // 2)
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._thread.start()

    def put(self, connection: Any) -> None:
        """Receive the request of a new connection."""
        self._tell(lambda: self._welcome(connection))

    def linger(self, connection: Any) -> None:
        """Close the connection after the client has, or after LINGER_S.

        The side that closes first keeps a socket in TIME_WAIT for a minute, and the ComfyUI client
        waits until the host's port can be bound without SO_REUSEADDR. If the process dies first,
        the connection is reset, which leaves no such socket.
        """
        if self._is_stopped:
            connection.finish()
        else:
            self._tell(lambda: self._let_linger(connection))

    def stop(self, within_s: float) -> None:
        """Give clients this time to read their answers, and close all connections."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and any(
            held.lingers_until_s is not None for held in list(self._open.values())
        ):
            time.sleep(0.02)
        self._is_stopped = True
        self._ring()
        if self._thread.is_alive():
            self._thread.join(within_s + 1)

    def _tell(self, act: Callable[[], None]) -> None:
        self._told.append(act)
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already
            self._bell.send(b".")

    def _run(self) -> None:
        looked_s = time.monotonic()
        while not self._is_stopped:
            for key, _ in self._selector.select(LOOK_EVERY_S):
                if key.data is None:
                    self._ear.recv(4096)
                else:
                    self._guarded(self._read, key.data)
            while self._told:
                self._guarded(self._told.popleft())
            if time.monotonic() - looked_s >= LOOK_EVERY_S:
                looked_s = time.monotonic()
                self._guarded(self._end_late)
        for connection in [*self._open, *self._turned_away]:
            self._guarded(self._close, connection)
        for each in (self._selector, self._bell, self._ear):
            each.close()

    @staticmethod
    def _guarded(act: Callable[..., None], *args: Any) -> None:
        """Whatever is wrong with one connection, the others go on."""
        try:
            act(*args)
        # this thread serves all connections, so it must outlive a fault in any of them
        except Exception:
            logger.exception("a connection failed")

    def _welcome(self, connection: Any) -> None:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.socket.setblocking(False)
        if not self._has_room(connection.remote_addr):
            self._turn_away(connection)
            return
        self._open[connection] = _Held(Incoming(max_body=self._max_body, admits=self._admits))
        self._of_address[connection.remote_addr] += 1
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _turn_away(self, connection: Any) -> None:
        """Answer 503. The connection lingers: a reset would overtake the answer, or even the end of
        the client's `connect`.
        """
        if len(self._turned_away) >= MAX_TURNED_AWAY:
            connection.finish()
            return
        self._turned_away[connection] = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            connection.socket.send(answer(BUSY.status, str(BUSY)))
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _has_room(self, address: str) -> bool:
        """Whether one more connection of this address fits. A connection that waits for its client
        makes room: of the address that has most, first one that lingers, then one without a whole
        head, each time the oldest.
        """
        is_greedy = self._of_address.get(address, 0) >= self._most * ADDRESS_SHARE
        if not is_greedy and len(self._open) < self._most:
            return True
        waiting = [
            ((-self._of_address[connection.remote_addr], _rank_of_end(held)), connection)
            for connection, held in self._open.items()
            if (held.incoming is not None or held.lingers_until_s is not None)
            and (not is_greedy or connection.remote_addr == address)
        ]
        if not waiting:
            return False
        self._close(min(waiting, key=lambda each: each[0])[1])
        return True

    def _read(self, connection: Any) -> None:
        held = self._open.get(connection)
        if held is None and connection not in self._turned_away:
            return  # closed meanwhile
        try:
            data = connection.socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # reset
            self._close(connection)
            return
        if held is None or held.incoming is None:
            if not data:
                self._close(connection, is_orderly=True)
        elif not data and not held.incoming.raw_head():
            self._close(connection)
        else:
            self._take(connection, held, held.incoming, data)

    def _take(self, connection: Any, held: _Held, incoming: Incoming, data: bytes) -> None:
        """Take the next bytes of a request. If there are none, the client sends no more."""
        try:
            is_complete = not data or incoming.feed(data)
            self._count(held, incoming.num_bytes)
            if held.num_bytes > FREE_BYTES and self._num_bytes > self._most_bytes:
                raise FULL
        except Refusal as refusal:
            self._refuse(connection, refusal)
            return
        waits = incoming.takes_continue()
        if is_complete:
            self._selector.unregister(connection.socket)
            held.incoming = None
            connection.socket.settimeout(SEND_WITHIN_S)
            connection.begin(incoming)
            self._deliver(connection)
        elif waits:
            with contextlib.suppress(OSError):
                connection.socket.send(INTERIM)

    def _count(self, held: _Held, num_bytes: int) -> None:
        self._num_bytes += num_bytes - held.num_bytes
        held.num_bytes = num_bytes

    def _refuse(self, connection: Any, refusal: Refusal) -> None:
        with contextlib.suppress(OSError):
            connection.socket.send(answer(refusal.status, str(refusal)))
        held = self._open[connection]
        held.incoming, held.lingers_until_s = None, time.monotonic() + LINGER_S
        self._count(held, 0)

    def _let_linger(self, connection: Any) -> None:
        held = self._open[connection]
        held.lingers_until_s = time.monotonic() + LINGER_S
        self._count(held, 0)
        connection.socket.setblocking(False)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _end_late(self) -> None:
        now_s = time.monotonic()
        for connection, end_s in list(self._turned_away.items()):
            if now_s >= end_s:
                self._close(connection, is_orderly=True)
        for connection, held in list(self._open.items()):
            if held.lingers_until_s is not None and now_s >= held.lingers_until_s:
                self._close(connection, is_orderly=True)
            elif held.incoming is not None and held.incoming.is_late():
                if held.incoming.raw_head():
                    self._refuse(connection, LATE)
                else:
                    self._close(connection)

    def _close(self, connection: Any, *, is_orderly: bool = False) -> None:
        """is_orderly: a slow client still gets the data that it has not read."""
        if self._turned_away.pop(connection, None) is None:
            self._count(self._open.pop(connection), 0)
            self._of_address[connection.remote_addr] -= 1
            if not self._of_address[connection.remote_addr]:
                del self._of_address[connection.remote_addr]
        with contextlib.suppress(KeyError, ValueError):  # a thread works on it
            self._selector.unregister(connection.socket)
        with contextlib.suppress(OSError):
            if is_orderly:
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDERLY)
            connection.finish()


def _rank_of_end(held: _Held) -> int:
    """Return the order in which connections make room for others."""
    if held.incoming is None:
        return 0
    return 2 if held.incoming.head else 1


def _num_descriptors() -> int:
    """Return how many descriptors this process may open, after raising its limit if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        higher = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (higher, hard))
            soft = higher
    return wanted if soft == resource.RLIM_INFINITY else soft
