"""A network between a client and a host that can be interrupted."""

import contextlib
import socket
import threading

from tests.hosts.harness import free_port


class Cutter:
    """A proxy before a host. cut: break all connections and refuse new ones, until `mend`."""

    def __init__(self, port):
        self._target, self._port, self.is_cut = port, free_port(), False
        self._open, self._server = [], None
        self.mend()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    def mend(self):
        self._server = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def cut(self):
        self.is_cut = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self, server):
        with contextlib.suppress(OSError):
            while True:
                near = server.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
