"""Requests with something wrong in their bytes, from a seed, and what a server answers to them."""

import contextlib
import json
import random
import socket

LONGEST_S = 60.0
ALLOWED = {501, 503, 505}
"""Of the statuses from 500 on. A transfer coding or a version of HTTP that is not there is said so
(RFC 9112, 6.1 and RFC 9110, 15.6.6).
"""
BODY = json.dumps({"prompt": "a red car", "num_inference_steps": 1, "width": 64, "height": 64})
JSON = b"Content-Type: application/json\r\n"
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na red car\r\n'
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n\x89PNG\r\n\x1a\n\r\n--b--\r\n"
)
GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
POST = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n%b"
CHUNKED = (
    b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
)
READ = (
    b"/", b"/livez", b"/healthz", b"/v1/jobs", b"/v1/jobs/x/events?previews=1", b"/v1/models",
    b"/openapi.json", b"/metrics", b"/settings", b"/sdapi/v1/progress", b"/v1/jobs/x/result?a=%zz",
)  # fmt: skip
SENT = (
    b"/generate", b"/v1/jobs", b"/v1/images/generations", b"/v1/images/edits",
    b"/sdapi/v1/txt2img", b"/v1/videos",
)  # fmt: skip
WHOLE = (
    *(GET % (path, b"") for path in READ),
    *(GET % (path, b"Accept: text/event-stream\r\nRange: bytes=0-\r\n") for path in READ[:4]),
    *(POST % (path, JSON, len(BODY), BODY.encode()) for path in SENT),
    *(CHUNKED % (path, len(BODY), BODY.encode()) for path in SENT[:2]),
    POST % (SENT[3], b"Content-Type: multipart/form-data; boundary=b\r\n", len(FORM), FORM),
    b"DELETE /v1/jobs/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
)
PIECES = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"[", b"\xff\xfe", b"\xf0\x9f\x98\x80",
    b"HTTP/1.1", b"HTTP/9.9", b"//", b"/../", b"?", b"#", b"%00", b"%zz", b"http://[", b"-1",
    b"99999999999999999999", b"0x10", b"1e9", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n",
    b"Host: [\r\n", b"Origin: http://[\r\n", b"Cookie: a\r\n b\r\n", b"Connection: upgrade\r\n",
    b"Upgrade: websocket\r\n", b"Authorization: Basic !!!\r\n", b"X-Forwarded-For: \xff\r\n",
    b"Range: bytes=9-1\r\n", b"Accept: ;q=x\r\n", b"Accept-Encoding: \0\r\n", b"{", b'"',
    b"\\ud83d", b"A" * 3000, b"X: " + b"y" * 70_000 + b"\r\n", b"a: b\r\n" * 300,
)  # fmt: skip


def hostile_bytes(chance: random.Random) -> bytes:
    """Return a request that was changed in one to four places, or no request at all."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(1, 300))
    data = bytearray(chance.choice(WHOLE))
    for _ in range(chance.randrange(1, 5)):
        _change(data, chance)
    return bytes(data)


def _change(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.randrange(1, 20))
    kind = chance.randrange(6)
    if kind == 0 and start < len(data):
        data[start] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[start:end]
    elif kind == 2:
        data[start:start] = chance.choice(PIECES)
    elif kind == 3:
        data[start:end] = chance.choice(PIECES)
    elif kind == 4:
        data[start:start] = data[start:end] * chance.randrange(1, 50)
    else:
        data += chance.choice(WHOLE)[: chance.randrange(200)]


def is_a_failure(status: int | None) -> bool:
    """Return whether the host failed, and not the client."""
    return status is not None and status >= 500 and status not in ALLOWED


def status_of(port: int, data: bytes, *, waits: bool = True) -> int | None:
    """Send the bytes and return the status of the answer; None for none, which is allowed.

    waits: else the client leaves without reading.
    """
    with socket.create_connection(("127.0.0.1", port), LONGEST_S) as client:
        # the server may have refused and closed before all of it was sent
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while waits and (part := client.recv(65536)):
                answer += part
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.") else None
