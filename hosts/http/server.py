"""The listener: cheroot threads, with the lingering close that old clients need."""

import contextlib
import errno
import logging
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.wsgi import Gateway_10, Server

from backends.errors import ConfigError

logger = logging.getLogger(__name__)

LINGER_S = 2.0
NUM_THREADS = 64
"""More than the queue's capacity: every waiting POST holds a thread, and status requests must
still be answered.
"""
LOOPBACK = ("127.0.0.1", "::1")
_RESET, _ORDERLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


CONNECTION = "hosts.connection"
"""WSGI environment key of the client's socket, to detect whether the client is still connected."""


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
"""An interim response, which every HTTP/1.1 client skips."""


class _Request(HTTPRequest):
    close_connection = True

    def parse_request(self) -> None:
        """Treat a request that cannot be parsed as the client's error, not the server's."""
        try:
            super().parse_request()
        except (ValueError, LookupError, NameError, OverflowError, MemoryError) as error:
            self.simple_response("400 Bad Request", f"the request cannot be read: {error}")

    def read_request_line(self) -> bool:
        """Read the request line. Several leading slashes count as one: some base URLs end in a
        slash.
        """
        self.rfile = _OneSlash(self.rfile)
        try:
            return super().read_request_line()
        finally:
            self.rfile = self.rfile.wrapped


class _OneSlash:
    """A file that starts with a request line. `POST //generate` becomes `POST /generate`."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def readline(self, *size: int) -> bytes:
        method, space, rest = self.wrapped.readline(*size).partition(b" ")
        return method + space + re.sub(rb"\A/{2,}", b"/", rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


class _Gateway(Gateway_10):
    def get_environ(self) -> dict[str, Any]:
        return {**super().get_environ(), CONNECTION: self.req.conn.socket}


class _Connection(HTTPConnection):
    """Closes only after the client did, or after LINGER_S.

    The side that closes first keeps a socket in TIME_WAIT for a minute, and the ComfyUI client
    waits until the host's port can be bound without SO_REUSEADDR. If the process dies first, the
    connection is reset, which leaves no such socket.
    """

    RequestHandlerClass = _Request

    def __init__(self, server: Any, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(server, sock, *args, **kwargs)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def close(self) -> None:
        deadline = time.monotonic() + LINGER_S
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(65536):
                    break
        except OSError:
            pass  # reset or timed out: nothing more to wait for
        with contextlib.suppress(
            OSError
        ):  # a slow client must still get the data that it has not read
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDERLY)
        super().close()


class Listener:
    """The HTTP server of rank 0. Call `bind` before slow work; `serve` returns at once."""

    def __init__(self, app: Callable[..., Any], *, host: str, port: int) -> None:
        self._servers = [self._server(app, address, port) for address in _addresses(host)]
        self.host, self.port = host, port

    def bind(self, *, patience_s: float = 0.0) -> None:
        """Bind the port. ConfigError if it is still taken after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while not all(is_port_free(server.bind_addr[0], self.port) for server in self._servers):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"--port={self.port} cannot be bound: another program, or another host, "
                    "listens there. Stop it, or choose another port."
                )
            time.sleep(0.5)
        for server in self._servers:
            try:
                server.prepare()
            except OSError as error:
                raise ConfigError(
                    f"--port={self.port} cannot be bound ({error}). Choose another port."
                ) from error

    def serve(self) -> None:
        """Answer requests, in threads."""
        for server in self._servers:
            threading.Thread(
                target=server.serve, name=f"http-{server.bind_addr[0]}", daemon=True
            ).start()
        logger.info("listening on http://%s:%d", self.host, self.port)

    def stop(self) -> None:
        """Finish pending responses (at most one second) and close."""
        for server in self._servers:
            server.stop()

    @staticmethod
    def _server(app: Callable[..., Any], address: str, port: int) -> Server:
        server = Server(
            (address, port),
            app,
            numthreads=NUM_THREADS,
            server_name="diffusion",
            shutdown_timeout=1,
            timeout=300,
        )
        server.ConnectionClass = _Connection
        server.gateway = _Gateway
        server.error_log = lambda message="", level=20, traceback=False: logger.log(
            level, "http: %s", message, exc_info=traceback
        )
        return server


class Peer:
    """The client of a connection while its job runs."""

    def __init__(self, connection: socket.socket, *, takes_interim: bool) -> None:
        """takes_interim: whether it accepts an interim response, as HTTP/1.1 clients do."""
        self._connection = connection
        self._takes_interim = takes_interim
        self._is_asked = False

    def is_gone(self) -> bool:
        """Whether the client has disconnected. Reads nothing and does not block.

        A client may close its sending side and still wait for the response (RFC 9112, 9.6). The two
        cases look alike until something is sent: a disconnected client answers with a reset, which
        the next call sees.
        """
        ready = select.poll()
        ready.register(self._connection, select.POLLIN)
        try:
            events = sum(event for _, event in ready.poll(0))
            if events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return True
            # poll first: recv on a socket with a timeout waits, whatever its flags
            if not events or self._connection.recv(1, socket.MSG_PEEK) != b"":
                return False
            if self._takes_interim and not self._is_asked:
                self._connection.send(INTERIM)
                self._is_asked = True
            return not self._takes_interim
        except OSError:
            return True


def is_port_free(host: str, port: int) -> bool:
    """Whether a listener for `host` could bind now, on each of its addresses."""
    return not any(_bind_errno(address, port) for address in _addresses(host))


def _addresses(host: str) -> tuple[str, ...]:
    """Return the addresses to listen on.

    localhost means both loopback addresses, since clients try either first; ::1 only if the machine
    has it.
    """
    if host not in ("127.0.0.1", "localhost"):
        return (host,)
    return LOOPBACK if _bind_errno("::1", 0) == 0 else LOOPBACK[:1]


def _bind_errno(address: str, port: int) -> int:
    """Return 0 if a socket can be bound there, else the error number."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0
