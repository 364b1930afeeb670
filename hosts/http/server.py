"""The listener: accepts connections, receives requests, and answers each in a thread.

cheroot parses and writes HTTP. hosts/http/connections/ has the connections on which no thread
works, with the lingering close that old clients need.
"""

import contextlib
import errno
import io
import logging
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.wsgi import Gateway_10, Server

from backends.errors import ConfigError
from hosts.http.connections.incoming import MAX_HEAD, Incoming, answer
from hosts.http.connections.receiver import INTERIM, SEND_WITHIN_S, Receiver
from hosts.http.connections.workers import Workers

logger = logging.getLogger(__name__)

NUM_THREADS = 64
"""Threads of a listener that is not told how many requests may wait."""
NUM_STATUS_THREADS = 8
BACKLOG = 1024
"""Connections that the kernel holds until they are accepted."""
NO_DESCRIPTOR_S = 0.2
"""Pause before the next connection is accepted, when the process has too many files open."""
STATUS_PATH = re.compile(
    rb"(/[^?]*)?/(|healthz|livez|readyz|metrics|settings|initialize|progress|v1/jobs(/[^/?]*)?)"
    rb"(\?.*)?"
)
"""What is answered at once, whatever else is asked: these requests have threads of their own."""
LOOPBACK = ("127.0.0.1", "::1")


CONNECTION = "hosts.connection"
"""WSGI environment key of the client's socket, to detect whether the client is still connected."""


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

    def respond(self) -> None:
        """Answer, with the body that the receiver has read."""
        incoming = self.conn.incoming
        self.conn.rfile = io.BytesIO(incoming.content())
        if (length := incoming.chunked_length) is not None:
            self.chunked_read = False
            self.inheaders.pop(b"Transfer-Encoding", None)
            self.inheaders[b"Content-Length"] = str(length).encode()
        super().respond()

    def simple_response(self, status: Any, msg: str = "") -> None:
        """Answer what no route sees, in JSON as the routes do."""
        with contextlib.suppress(OSError):
            text = str(msg) or "the request cannot be answered. Send it again."
            self.conn.wfile.write(answer(str(status), text))


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
    """A connection of which the receiver reads the request and sees the end."""

    RequestHandlerClass = _Request

    def begin(self, incoming: Incoming) -> None:
        """Let a thread answer this request."""
        self.incoming = incoming
        self.rfile = io.BytesIO(incoming.raw_head())

    def is_for_status(self) -> bool:
        method, _, rest = self.incoming.raw_head().partition(b" ")
        path = rest.split(b" ", 1)[0]
        return method in (b"GET", b"HEAD") and STATUS_PATH.fullmatch(path) is not None

    def close(self) -> None:
        """Let the client read the answer and close."""
        self.server.requests.receiver.linger(self)

    def finish(self) -> None:
        """Close the socket."""
        super().close()


class _Requests:
    """What cheroot calls its thread pool: the receiver and the threads behind it."""

    def __init__(self, *, max_body: int, admits: Callable[[str], bool], num_threads: int) -> None:
        self._workers = Workers("http", most=num_threads)
        self._status_workers = Workers("http-status", most=NUM_STATUS_THREADS)
        self._num_started = 0
        self.receiver = Receiver(deliver=self._deliver, max_body=max_body, admits=admits)

    def put(self, connection: _Connection) -> None:
        self.receiver.put(connection)

    def start(self) -> None:
        """Called for each address. The first call starts the receiver, the last stop ends it."""
        self._num_started += 1
        if self._num_started == 1:
            self.receiver.start()

    def stop(self, timeout: float) -> None:
        self._num_started -= 1
        if self._num_started == 0:
            self._workers.stop(timeout)
            self._status_workers.stop(0)
            self.receiver.stop(timeout)

    def _deliver(self, connection: _Connection) -> None:
        workers = self._status_workers if connection.is_for_status() else self._workers
        workers.put(connection)


class Listener:
    """The HTTP server of rank 0. Call `bind` before slow work; `serve` returns at once."""

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        host: str,
        port: int,
        max_body: int = 256 * 10**6,
        admits: Callable[[str], bool] = lambda authorization: True,
        num_threads: int = NUM_THREADS,
    ) -> None:
        """max_body: largest body that is received, in bytes; for larger ones the app is asked
        without the body. admits: whether a client with this Authorization may send a body, before
        it is received. num_threads: requests that may be answered at once, beside those of
        STATUS_PATH.
        """
        requests = _Requests(max_body=max_body, admits=admits, num_threads=num_threads)
        self._servers = [self._server(app, address, port, requests) for address in _addresses(host)]
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
    def _server(app: Callable[..., Any], address: str, port: int, requests: _Requests) -> Server:
        server = Server(
            (address, port),
            app,
            numthreads=1,
            server_name="diffusion",
            request_queue_size=BACKLOG,
            shutdown_timeout=1,
            timeout=SEND_WITHIN_S,
        )
        server.requests = requests
        server.max_request_header_size = MAX_HEAD
        server.ConnectionClass = _Connection
        server.gateway = _Gateway
        server.error_log = _log
        return server


def _log(message: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
    """Log what cheroot reports. It accepts the next connection at once, so a process without free
    descriptors would do nothing else.
    """
    error = sys.exc_info()[1]
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        logger.log(level, "http: too many open files: no connection is accepted for now")
        time.sleep(NO_DESCRIPTOR_S)
        return
    logger.log(level, "http: %s", message, exc_info=traceback)


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


def require_address(host: str) -> None:
    """ConfigError if no listener can have this address on this machine."""
    if any(_bind_errno(address, 0) for address in _addresses(host)):
        raise ConfigError(
            f"--host={host} is not an address of this machine. Give one, such as 127.0.0.1, or "
            "0.0.0.0 for all of them."
        )


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
    except (OSError, UnicodeError, ValueError) as error:
        return getattr(error, "errno", None) or errno.EINVAL
    return 0
