"""Connections that send nothing, slowly, too much or badly, and those of honest clients beside
them.
"""

import contextlib
import os
import resource
import socket
import threading
import time

import pytest
from flask import Flask, request

from hosts.http.connections import incoming, receiver
from hosts.http.server import Listener
from tests.hosts.harness import free_port, session, wait_until

MANY = 200
"""Connections, more than the listener has threads."""
HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
BEGINNINGS = {
    "nothing": b"",
    "half a request line": b"GET /liv",
    "half a head": b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ",
    "half a body": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n{",
}


def application(release=None):
    app = Flask("test")
    app.config["MAX_CONTENT_LENGTH"] = 10**6
    app.get("/livez")(lambda: "OK")
    app.post("/echo", endpoint="echo")(lambda: request.get_data())
    app.post("/length", endpoint="length")(lambda: str(len(request.get_data())))
    app.get("/wait", endpoint="wait")(lambda: str(release.wait(30)))
    return app


@contextlib.contextmanager
def listening(**options):
    release = threading.Event()
    made = Listener(
        application(release), host="127.0.0.1", port=free_port(), max_body=10**6, **options
    )
    made.bind()
    made.serve()
    try:
        yield made
    finally:
        release.set()
        made.stop()


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch):
    monkeypatch.setattr(receiver, "LINGER_S", 0.2)


@pytest.fixture
def listener():
    with listening() as made:
        yield made


@contextlib.contextmanager
def connected(port, number, data=b"", source="127.0.0.1"):
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(number):
            connection = socket.create_connection(("127.0.0.1", port), 5, (source, 0))
            made.append(stack.enter_context(connection))
            connection.sendall(data)
        yield made


def answers(port, path="/livez", timeout=3):
    return session().get(f"http://127.0.0.1:{port}{path}", timeout=timeout).text


def everything(connection, timeout=10):
    """What the server sends until it closes."""
    connection.settimeout(timeout)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def exchange(port, data):
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(data)
        return everything(connection)


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
def test_connections_without_a_whole_request_hold_no_thread(listener, beginning):
    with connected(listener.port, MANY, beginning):
        assert answers(listener.port) == "OK"
        assert exchange(listener.port, HEAD + b"Content-Length: 2\r\n\r\nhi").endswith(b"hi")
        num_threads = sum(thread.name == "http" for thread in threading.enumerate())
        assert num_threads <= 2


def test_clients_that_never_close_hold_no_thread(listener, monkeypatch):
    """They have their answer and wait for the end of the connection."""
    monkeypatch.setattr(receiver, "LINGER_S", 2.0)
    with connected(listener.port, MANY, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        assert answers(listener.port, timeout=1.5) == "OK"


def test_clients_that_come_at_once_are_all_let_in_before_any_is_looked_at():
    """A full backlog drops them, and they try again after seconds."""
    made = Listener(application(), host="127.0.0.1", port=free_port(), max_body=10**6)
    made.bind()
    with connected(made.port, 500, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n") as clients:
        made.serve()
        try:
            assert all(everything(client).endswith(b"OK") for client in clients)
        finally:
            made.stop()


def test_host_without_free_descriptors_is_quiet_and_goes_on(listener, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + 40, hard))
        with pytest.raises(OSError, match="Too many open files"):
            for _ in range(100):
                client = socket.create_connection(("127.0.0.1", listener.port), 5)
                stack.enter_context(client)
        wait_until(lambda: "too many open files" in caplog.text, within_s=20, what="it is told")
        time.sleep(1)
        assert len(caplog.records) < 20 and "Traceback" not in caplog.text
    wait_until(lambda: answers(listener.port) == "OK", within_s=20, what="it answers again")


def test_status_is_answered_while_all_threads_work():
    with listening(num_threads=4) as made:
        waiting = b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with connected(made.port, 8, waiting):
            wait_until(
                lambda: sum(t.name == "http" for t in threading.enumerate()) == 4,
                within_s=5,
                what="all threads work",
            )
            assert answers(made.port) == "OK"
            assert answers(made.port, "/livez?verbose=1") == "OK"


@pytest.mark.parametrize("beginning", BEGINNINGS.values(), ids=BEGINNINGS)
def test_request_that_does_not_arrive_in_time_is_answered_408(listener, beginning, monkeypatch):
    monkeypatch.setattr(incoming, "HEAD_WITHIN_S", 0.3)
    monkeypatch.setattr(incoming, "BODY_WITHIN_S", 0.3)
    answer = exchange(listener.port, beginning)
    assert answer == b"" if not beginning else answer.startswith(b"HTTP/1.1 408 ")


def test_slow_drip_is_late_but_a_slow_upload_is_not(listener, monkeypatch):
    monkeypatch.setattr(incoming, "BODY_WITHIN_S", 0.5)
    monkeypatch.setattr(incoming, "LEAST_BYTES_PER_S", 10_000)
    for size, status in ((1, b"408"), (10_000, b"200")):
        with socket.create_connection(("127.0.0.1", listener.port), 5) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (12 * size))
            with contextlib.suppress(OSError):
                for _ in range(12):
                    connection.sendall(b"x" * size)
                    time.sleep(0.1)
            assert everything(connection)[9:12] == status


@pytest.mark.parametrize(
    "head",
    [b"GET /" + b"x" * 100_000, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000],
    ids=["request line", "header"],
)
def test_head_beyond_its_size_is_refused_while_it_arrives(listener, head):
    assert exchange(listener.port, head).startswith(b"HTTP/1.1 431 ")


def test_connections_are_bounded_and_the_silent_ones_make_room(monkeypatch):
    monkeypatch.setattr(receiver, "MAX_CONNECTIONS", 40)
    with listening() as made, connected(made.port, 15) as others:
        with connected(made.port, 60, source="127.0.0.2") as silent:
            assert answers(made.port) == "OK"
            wait_until(lambda: num_open(silent) <= 30, within_s=5, what="closed")
            assert num_open(others) == 15  # the address with most connections makes room
        assert answers(made.port) == "OK"


def num_open(connections):
    """Those that the server has neither answered nor closed."""
    number = 0
    for connection in connections:
        connection.settimeout(0.001)
        try:
            connection.recv(1)
        except TimeoutError:
            number += 1
        except OSError:
            pass
    return number


def test_more_connections_than_may_be_worked_on_are_answered_503(monkeypatch):
    monkeypatch.setattr(receiver, "MAX_CONNECTIONS", 10)
    with listening() as made:
        waiting = b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with (
            connected(made.port, 7, waiting, source="127.0.0.2"),
            connected(made.port, 3, waiting, source="127.0.0.3"),
        ):
            wait_until(
                lambda: sum(t.name == "http" for t in threading.enumerate()) == 10,
                within_s=5,
                what="all wait",
            )
            monkeypatch.setattr(receiver, "LINGER_S", 2.0)
            with socket.create_connection(("127.0.0.1", made.port), 5) as client:
                assert client.recv(1) == b"H"  # answered before it has sent anything
                client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000)
                answer = b"H" + client.recv(65536)
                assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in answer
                client.sendall(b"more")  # not reset while the client may still read


def test_connections_that_are_turned_away_are_bounded_and_end(monkeypatch):
    monkeypatch.setattr(receiver, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(receiver, "MAX_TURNED_AWAY", 3)
    monkeypatch.setattr(receiver, "LINGER_S", 0.5)
    with listening() as made:
        waiting = b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with (
            connected(made.port, 3, waiting, source="127.0.0.2"),
            connected(made.port, 1, waiting, source="127.0.0.3"),
        ):
            wait_until(
                lambda: sum(t.name == "http" for t in threading.enumerate()) == 4,
                within_s=5,
                what="all wait",
            )
            with connected(made.port, 3) as first:
                assert all(client.recv(8) == b"HTTP/1.1" for client in first)
                with contextlib.suppress(OSError), connected(made.port, 1) as (beyond,):
                    assert everything(beyond) == b""
                assert all(everything(client, timeout=3).endswith(b"}") for client in first)


def test_bodies_of_all_requests_together_are_bounded(monkeypatch):
    monkeypatch.setattr(receiver, "LEAST_HELD", 10)
    with listening() as made:
        beginning = HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 900_000
        with connected(made.port, 8, beginning) as connections:
            wait_until(lambda: num_open(connections) <= 5, within_s=10, what="some are refused")
            assert exchange(made.port, HEAD + b"Content-Length: 2\r\n\r\nhi").endswith(b"hi")
        wait_until(
            lambda: exchange(made.port, beginning + b"x" * 100_000).endswith(b"x"),
            within_s=10,
            what="their room is given back",
        )


def test_body_of_a_client_without_the_key_is_not_received():
    with listening(admits=lambda given: given == "Bearer good") as made:
        body = b"Content-Length: 900000\r\nExpect: 100-continue\r\n"
        stranger = exchange(made.port, HEAD + b"Authorization: Bearer bad\r\n" + body + b"\r\n")
        assert b"100 Continue" not in stranger  # the app is asked without the body
        with socket.create_connection(("127.0.0.1", made.port), 5) as client:
            client.sendall(HEAD + b"Authorization: Bearer good\r\n" + body + b"\r\n")
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"x" * 900_000)
            answer = everything(client)
        assert answer.startswith(b"HTTP/1.1 200") and len(answer) > 900_000


def chunked(*sizes, end=b"0\r\n\r\n"):
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (size, b"x" * size) for size in sizes)
    return b"POST /length HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + end


@pytest.mark.parametrize(
    ("data", "status", "ending"),
    [
        (chunked(1, 20, 300_000), b"200", b"300021"),
        (chunked(), b"200", b"0"),
        (chunked(5, end=b"0\r\nTrailer: 1\r\n\r\n"), b"200", b"5"),
        (chunked(600_000, 600_000), b"413", b""),
        (chunked(end=b"8000000000000000\r\n"), b"413", b""),
        (chunked(end=b"-1\r\n"), b"400", b""),
        (chunked(end=b"1" * 2000), b"400", b""),
        (HEAD + b"Content-Length: 2000000\r\n\r\n", b"413", b""),
        (HEAD + b"Content-Length: -1\r\n\r\n", b"400", b""),
        (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400", b""),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nhi", b"400", b""),
        (b"\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nhi", b"200", b"hi"),
    ],
    ids=range(12),
)
def test_bodies_in_chunks_and_of_impossible_lengths(listener, data, status, ending):
    answer = exchange(listener.port, data)
    assert answer[9:12] == status and answer.endswith(ending)


def test_body_in_single_bytes_is_the_same(listener):
    with socket.create_connection(("127.0.0.1", listener.port), 5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in chunked(3, 17):
            connection.sendall(bytes([byte]))
        assert everything(connection).endswith(b"\r\n\r\n20")


def test_large_chunk_arrives_whole():
    received = incoming.Incoming(max_body=2**30, admits=lambda given: True)
    data = chunked(2**24)
    assert [received.feed(data[at : at + 65536]) for at in range(0, len(data), 65536)][-1]
    assert len(received.content()) == received.chunked_length == 2**24
