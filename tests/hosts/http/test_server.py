"""The listener: taking the port, and how connections end."""

import contextlib
import select
import socket
import threading
import time

import pytest
import requests
from flask import Flask

from backends.errors import ConfigError
from hosts.http import server
from hosts.http.connections import receiver
from hosts.http.server import Listener, is_port_free
from tests.hosts.harness import free_port, session, wait_until


def application(content="here"):
    app = Flask("test")
    app.get("/")(lambda: content)
    app.get("/here", endpoint="here")(lambda: content)
    return app


@pytest.fixture
def listener():
    made = Listener(application(), host="127.0.0.1", port=free_port())
    made.bind()
    made.serve()
    yield made
    made.stop()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]", "localhost"])
def test_localhost_is_served_by_both_its_addresses(address, listener):
    if address == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    assert session().get(f"http://{address}:{listener.port}/", timeout=5).text == "here"


def test_nothing_listens_beyond_the_loopback(listener):
    with (
        pytest.raises(OSError),
        socket.create_connection((_own_address(), listener.port), timeout=2),
    ):
        pass


def _own_address():
    """An address of this machine other than the loopback; 127.0.0.2 stands in where there is
    none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.2"


def test_taken_port_is_refused_and_its_owner_undisturbed(listener):
    assert not is_port_free("127.0.0.1", listener.port)
    with pytest.raises(
        ConfigError,
        match=f"--port={listener.port} cannot be bound: .* Stop it, or choose another port",
    ):
        Listener(application(), host="127.0.0.1", port=listener.port).bind()
    assert session().get(f"http://127.0.0.1:{listener.port}/", timeout=5).text == "here"


def test_port_taken_on_ipv6_only_is_refused_too():
    """Clients that resolve localhost to ::1 first would talk to the other program."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("::1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert not is_port_free("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"--port={port} cannot be bound"):
            Listener(application(), host="127.0.0.1", port=port).bind()


def test_bind_waits_for_a_port_that_is_given_back():
    port = free_port()
    other = socket.socket()
    other.bind(("127.0.0.1", port))
    other.listen()
    threading.Timer(0.7, other.close).start()
    made = Listener(application(), host="127.0.0.1", port=port)
    started = time.monotonic()
    made.bind(patience_s=10)
    assert 0.4 < time.monotonic() - started < 8
    made.serve()
    made.stop()


def test_server_waits_for_the_client_to_close_first(listener):
    with socket.create_connection(("127.0.0.1", listener.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(5)
        answer = b""
        while not answer.endswith(b"here"):
            answer += client.recv(4096)
        assert b"Connection: close" in answer and b"Content-Length: 4" in answer
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)  # a byte less would mean that the server closed


def test_server_does_not_wait_for_ever(listener, monkeypatch):
    monkeypatch.setattr(receiver, "LINGER_S", 0.3)
    with socket.create_connection(("127.0.0.1", listener.port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(5)
        while client.recv(4096):
            pass


def test_slow_client_gets_the_whole_answer(monkeypatch):
    """More than the socket buffers hold, read only after the server has stopped waiting."""
    monkeypatch.setattr(receiver, "LINGER_S", 0.2)
    size = 3_000_000
    made = Listener(application(b"x" * size), host="127.0.0.1", port=free_port())
    made.bind()
    made.serve()
    try:
        with socket.create_connection(("127.0.0.1", made.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.settimeout(10)
            time.sleep(1)
            answer = b""
            while part := client.recv(65536):
                answer += part
        assert answer.endswith(b"x" * size)
    finally:
        made.stop()


def test_clients_that_hold_their_connection_do_not_block_others(listener):
    idle = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(10)]
    try:
        assert requests.get(f"http://127.0.0.1:{listener.port}/", timeout=2).text == "here"
    finally:
        for connection in idle:
            connection.close()


def raw(port, data, *, half_closed=False):
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(data)
        if half_closed:
            client.shutdown(socket.SHUT_WR)
        client.settimeout(20)
        answer = b""
        while part := client.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize("path", [b"/", b"//", b"/here", b"//here", b"///here"])
def test_slashes_before_the_path_count_once(listener, path):
    answer = raw(listener.port, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"here")


@pytest.mark.parametrize(
    "head",
    [
        b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n folded\r\n\r\n",
        b"GET\r\n\r\n",
    ],
)
def test_requests_that_cannot_be_read_are_the_clients_mistake(listener, head, caplog):
    assert raw(listener.port, head)[9:12] in (b"400", b"404")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.0"])
def test_client_that_closes_its_sending_side_is_not_gone_but_one_that_leaves_is(protocol):
    with socket.create_server(("127.0.0.1", 0)) as accepting:
        client = socket.create_connection(accepting.getsockname())
        connection, _ = accepting.accept()
        with connection:
            peer = server.Peer(connection, takes_interim=protocol == "HTTP/1.1")
            assert not peer.is_gone()
            client.shutdown(socket.SHUT_WR)
            wait_until(
                lambda: select.select([connection], [], [], 0)[0], within_s=5, what="it is seen"
            )
            looks = [peer.is_gone() for _ in range(3)]
            assert looks == [protocol == "HTTP/1.0"] * 3  # HTTP/1.0 has no interim answers
            if protocol == "HTTP/1.1":
                assert client.recv(4096) == server.INTERIM
            client.close()
            wait_until(lambda: _is_gone(peer, connection), within_s=5, what="it is gone")


def _is_gone(peer, connection):
    """Whether it is seen to be gone; what an interim answer would do is done by hand here."""
    with contextlib.suppress(OSError):
        connection.send(b" ")
    return peer.is_gone()
