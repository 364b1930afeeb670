"""Several machines as one host: where their ranks meet, and how to reach each other. Imports no
torch.

Each machine's launcher supervises its own ranks. Rank 0 opens a store at --rdzv_endpoint, to which
all ranks come; whoever is missing is waited for in the ranks themselves, so that rank 0 can answer
meanwhile. One store is for one meeting: a rank that comes a second time was started again, which
ends the set on all machines, and all meet anew.
"""

import contextlib
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import psutil

from backends.errors import ConfigError
from hosts.supervision.exit_reports import ExitReport

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.3
CONNECT_WITHIN_S = 5.0
"""For one attempt to reach the store; there are many."""
ENDED = "watch/ended"
"""Key under which a rank that was started again says why; the watch
(hosts/supervision/heartbeat.py) of every rank looks at it.
"""


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, value: int) -> int: ...

    def check(self, keys: list[str]) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class RendezvousStale(Exception):
    """This store belongs to a meeting that is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Of one host. endpoint: where rank 0's store is. rank, local_world_size: of the rank that
    meets the others.

    facts: what must be the same on all machines, by argument.
    """

    endpoint: tuple[str, int]
    rank: int
    world_size: int
    local_world_size: int
    within_s: float
    facts: Mapping[str, str] = field(default_factory=dict)

    def meet(
        self,
        open_store: Callable[..., Store],
        *,
        ending: ExitReport,
        tell: Callable[[str], None] = lambda waiting_for: None,
        still_waiting: Callable[[], None] = lambda: None,
    ) -> Store:
        """The store, once every rank is there. ConfigError if one does not come in time, or was
        started with other arguments.

        open_store(host, port, is_here=, timeout_s=): RuntimeError if it cannot be reached. ending:
        of this rank's last life.
        tell: hears what is waited for, whenever that changes. still_waiting: is called all the
        time.
        """
        deadline = time.monotonic() + self.within_s
        told = ""
        while True:
            waiting_for = f"machine 0 at {self._address}"
            with contextlib.suppress(
                RendezvousStale, RuntimeError, OSError
            ):  # nobody there yet, or gone while we asked
                store = self._open(open_store)
                self._join(store, ending)
                while waiting_for := self._missing(store):
                    told = _tell(tell, waiting_for, told)
                    self._go_on_waiting(still_waiting, deadline, waiting_for)
                if self.rank == 0:
                    store.set("all", "here")
                return store
            told = _tell(tell, waiting_for, told)
            self._go_on_waiting(still_waiting, deadline, waiting_for)

    def _open(self, open_store: Callable[..., Store]) -> Store:
        return open_store(*self.endpoint, is_here=self.rank == 0, timeout_s=CONNECT_WITHIN_S)

    def _join(self, store: Store, ending: ExitReport) -> None:
        if store.check([ENDED]):
            raise RendezvousStale
        if self.rank == 0:
            store.set("facts", json.dumps(self.facts))
        store.wait(["facts"], timedelta(seconds=CONNECT_WITHIN_S))
        self._require_same(json.loads(store.get("facts")))
        if store.add(f"here/{self.rank}", 1) > 1:
            store.set(ENDED, ending.to_text())
            raise RendezvousStale

    def _require_same(self, facts: Mapping[str, str]) -> None:
        for name, theirs in facts.items():
            if (mine := self.facts.get(name)) != theirs:
                raise ConfigError(
                    f"{name} is {mine} on this machine and {theirs} on machine 0. Start all "
                    "machines with the same arguments "
                    "but for --node_rank, and with the same files at the same paths."
                )

    def _missing(self, store: Store) -> str:
        """Who is waited for; empty once all have come. RendezvousStale if one was started again
        meanwhile.
        """
        if store.check([ENDED]):
            raise RendezvousStale
        absent = [rank for rank in range(self.world_size) if not store.check([f"here/{rank}"])]
        if not absent:
            return "" if self.rank == 0 or store.check(["all"]) else "machine 0"
        numbers = sorted({rank // self.local_world_size for rank in absent})
        names = ", ".join(map(str, numbers))
        return (
            f"machine{'s' if len(numbers) > 1 else ''} {names} of "
            f"{self.world_size // self.local_world_size} to come to {self._address}"
        )

    def _go_on_waiting(
        self, still_waiting: Callable[[], None], deadline: float, waiting_for: str
    ) -> None:
        still_waiting()
        if time.monotonic() > deadline:
            raise ConfigError(
                f"waited {self.within_s:g} s for {waiting_for} (--node_timeout). Start every "
                "machine with its own --node_rank, "
                "see that they reach each other, or start with fewer (--nnodes)."
            )
        time.sleep(LOOK_EVERY_S)

    @property
    def _address(self) -> str:
        host, port = self.endpoint
        return f"{host}:{port}"


def _tell(tell: Callable[[str], None], now: str, before: str) -> str:
    if now != before:
        logger.warning("waiting for %s", now)
        tell(f"waiting for {now}")
    return now


def parse_endpoint(text: str) -> tuple[str, int]:
    """'10.0.0.1:29500' or '[fd00::1]:29500'. ConfigError for anything else."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--rdzv_endpoint={text} is not allowed. Give HOST:PORT, an address of the first "
            "machine and a free port there."
        )
    return host, int(port)


def interface_towards(endpoint: tuple[str, int]) -> str | None:
    """The network interface by which this machine reaches an address (or has it); None if it cannot
    be told.

    gloo and NCCL would otherwise take the interface of the machine's own name, which often is the
    loopback.
    """
    with contextlib.suppress(OSError, ValueError):
        family, kind, protocol, _, address = socket.getaddrinfo(*endpoint, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
        for name, addresses in psutil.net_if_addrs().items():
            if any(_is(each, own) for each in addresses):
                return name
    return None


def _is(found: Any, own: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(found.address.partition("%")[0]) == own
    return False
