"""One request while its bytes arrive: where its head ends, which body follows, and when it is late.

hosts/http/connections/receiver.py feeds it from a socket. A request is complete, and gets a thread,
only when all of it is here. The head is parsed again by cheroot, which answers what is malformed.
"""

import io
import json
import re
import time
from collections.abc import Callable

MAX_HEAD = 64 * 1024
"""Bytes of the request line and the headers together."""
MAX_CHUNK_LINE = 1024
MAX_TRAILERS = 100
HEAD_WITHIN_S = 10.0
BODY_WITHIN_S = 30.0
"""Time for a body of no size; LEAST_BYTES_PER_S adds to it."""
LEAST_BYTES_PER_S = 16 * 1024
"""Slowest body, in bytes of body per second."""

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_EXPECT = re.compile(rb"^expect:[ \t]*100-continue[ \t]*\r?\n", re.IGNORECASE | re.MULTILINE)


class Refusal(Exception):
    """The request is answered without a thread."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def answer(status: str, message: str) -> bytes:
    """Return a whole response with an error, as the routes write theirs."""
    body = json.dumps({"message": message}).encode()
    again = b"Retry-After: 5\r\n" if status.startswith("503") else b""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n"
    ).encode() + b"%b\r\n%b" % (again, body)


class Incoming:
    """The bytes of one request so far."""

    def __init__(self, *, max_body: int, admits: Callable[[str], bool]) -> None:
        """max_body: bytes. admits: whether a client with this Authorization may send a body; if
        not, the request is complete without one, since it will be refused.
        """
        self._max_body = max_body
        self._admits = admits
        self._arrived = bytearray()
        self._began_s = time.monotonic()
        self._body: _Sized | _Chunked | None = None
        self.head = b""
        """Without the body; empty until it is complete."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the body so far."""
        return self._body.num_bytes if self._body is not None else 0

    @property
    def chunked_length(self) -> int | None:
        """Length of a body that came in chunks; more than allowed if it was not read."""
        return self._body.length if isinstance(self._body, _Chunked) else None

    def feed(self, data: bytes) -> bool:
        """Take the next bytes and return whether the request is complete. Refusal if it cannot be
        received.
        """
        if self._body is not None:
            return self._body.feed(data)
        begin = max(0, len(self._arrived) - 3)
        self._arrived += data
        if begin == 0:  # empty lines before a request are skipped (RFC 9112, 2.2)
            self._arrived = self._arrived.lstrip(b"\r\n")
        end = _END_OF_HEAD.search(self._arrived, begin)
        if (end.end() if end else len(self._arrived)) > MAX_HEAD:
            raise Refusal(
                "431 Request Header Fields Too Large",
                f"the request line and the headers have more than {MAX_HEAD} bytes. Send less.",
            )
        if end is None:
            return False
        self.head, rest = bytes(self._arrived[: end.end()]), bytes(self._arrived[end.end() :])
        self._arrived.clear()
        self._began_s = time.monotonic()
        return self._begin_body(rest)

    def content(self) -> bytes:
        """Return the body, its chunks joined."""
        return self._body.content() if self._body is not None else b""

    def raw_head(self) -> bytes:
        """Return the head, or the beginning of one that the client never finished."""
        return self.head or bytes(self._arrived)

    def takes_continue(self) -> bool:
        """Whether the client waits for an interim response before it sends the body. True once."""
        self.head, count = _EXPECT.subn(b"", self.head, count=1)
        return count > 0

    def is_late(self) -> bool:
        """Whether the client has had its time."""
        waited_s = time.monotonic() - self._began_s
        if self._body is None:
            return waited_s > HEAD_WITHIN_S
        return waited_s > BODY_WITHIN_S + self._body.num_bytes / LEAST_BYTES_PER_S

    def _headers(self, name: str) -> list[str]:
        """Return the different values of this header."""
        pattern = rb"^" + name.encode() + rb":[ \t]*([^\r\n]*)"
        found = re.findall(pattern, self.head, re.IGNORECASE | re.MULTILINE)
        return sorted({value.decode("latin-1").strip() for value in found})

    def _begin_body(self, rest: bytes) -> bool:
        if not self._admits(", ".join(self._headers("authorization"))):
            return True
        if coding := ", ".join(self._headers("transfer-encoding")):
            if coding.lower() != "chunked":
                return True  # cheroot answers that it is not implemented
            self._body = _Chunked(self._max_body)
            return self._body.feed(rest)
        length = ", ".join(self._headers("content-length"))
        if not length:
            return True
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise Refusal(
                "400 Bad Request",
                f"Content-Length={length[:40]!r} is not a length. Send the body's, in bytes.",
            )
        if int(length) > self._max_body:
            return True  # the route answers what is allowed
        self._body = _Sized(int(length))
        return self._body.feed(rest)


class _Sized:
    """A body whose length the client has sent."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._content = io.BytesIO()
        self.num_bytes = 0

    def feed(self, data: bytes) -> bool:
        self.num_bytes += self._content.write(data[: self._length - self.num_bytes])
        return self.num_bytes == self._length

    def content(self) -> bytes:
        return self._content.getvalue()


class _Chunked:
    """A body in chunks. One that is larger than allowed ends at once, and its length says so."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._content = io.BytesIO()
        self._line = bytearray()
        self._left = 0
        """Bytes of the present chunk, with its line end; 0 where a line is expected."""
        self._is_last = False
        self._num_lines = 0
        self.num_bytes = self.length = 0

    def feed(self, data: bytes) -> bool:
        at = 0
        while at < len(data):
            if self._left:
                at += self._take(data[at : at + self._left])
                continue
            end = data.find(b"\n", at) + 1
            self._line += data[at : end or len(data)]
            at = end or len(data)
            if len(self._line) > MAX_CHUNK_LINE:
                raise _unreadable("a line between the chunks is too long")
            if end and self._end_line():
                return True
        return False

    def content(self) -> bytes:
        return self._content.getvalue()

    def _take(self, data: bytes) -> int:
        """Take bytes of the present chunk, of which its line end is not content."""
        self._content.write(data[: max(0, self._left - 2)])
        self._left -= len(data)
        self.num_bytes = self.length = self._content.tell()
        return len(data)

    def _end_line(self) -> bool:
        """Read a whole line: the size of a chunk, or a trailer. Return whether the body ends."""
        line = bytes(self._line).strip()
        self._line.clear()
        if self._is_last:
            self._num_lines += 1
            if self._num_lines > MAX_TRAILERS:
                raise _unreadable("it has too many trailers")
            return not line
        text = line.partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,16}", text):
            raise _unreadable(f"a chunk has the size {text[:20]!r}")
        if (total := self.num_bytes + int(text, 16)) > self._most:
            self._content, self.num_bytes, self.length = io.BytesIO(), 0, total
            return True
        self._is_last = int(text, 16) == 0
        self._left = 0 if self._is_last else int(text, 16) + 2
        return False


def _unreadable(reason: str) -> Refusal:
    return Refusal(
        "400 Bad Request",
        f"the body's chunks cannot be read: {reason}. Send the body with a Content-Length.",
    )
