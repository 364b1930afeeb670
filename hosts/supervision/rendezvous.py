"""Ranks of one machine or several: this rank's place among them, and how several machines
rendezvous. Imports no torch.

Each machine's launcher supervises its own ranks. Rank 0 opens a store at --rdzv_endpoint, which all
ranks join. The ranks themselves wait for missing ones, so rank 0 can answer HTTP meanwhile. A store
is for one rendezvous: a rank that joins it twice was restarted, which ends the set on all machines,
and all rendezvous again.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import psutil

from backends.errors import ConfigError
from hosts.launch.option import split_endpoint
from hosts.launch.settings import Settings
from hosts.supervision.exit_reports import ExitReport, NoNotes, RankNotes

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.3
CONNECT_WITHIN_S = 5.0
"""For one attempt to reach the store; there are many."""
NONCE = "nonce"
"""Name among the facts of what is different in each rendezvous."""
PROOF_CHARS = 64
ENDED = "watch/ended"
"""Key under which a restarted rank writes why it ended. Every rank's watch
(hosts/supervision/heartbeat.py) looks at it.
"""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This rank among the others."""

    rank: int
    """Among the ranks of all machines."""
    local_rank: int
    world_size: int
    local_world_size: int
    attempt: int = 0
    """How often torchelastic has restarted this set of ranks."""
    is_one_of_several: bool = False
    """Whether torchelastic knows only this machine's ranks, which rendezvous with those of other
    machines by themselves.
    """

    @classmethod
    def of(cls, settings: Settings, environ: Mapping[str, str]) -> "Place":
        """The place that torchelastic wrote into the environment."""
        rank, local_rank = int(environ.get("RANK", 0)), int(environ.get("LOCAL_RANK", 0))
        world_size = int(environ.get("WORLD_SIZE", 1))
        local_world_size = int(environ.get("LOCAL_WORLD_SIZE", world_size))
        # else a torchrun that was started by hand over all machines
        is_one_of_several = settings.nnodes > 1 and world_size == local_world_size
        return cls(
            rank=rank + (settings.node_rank * local_world_size if is_one_of_several else 0),
            local_rank=local_rank,
            world_size=world_size * (settings.nnodes if is_one_of_several else 1),
            local_world_size=local_world_size,
            attempt=int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            is_one_of_several=is_one_of_several,
        )

    @property
    def local_ranks(self) -> range:
        """The ranks of this machine, as numbers among all ranks."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

    def notes(self, folder: str | None, *, attempts_ago: int = 0) -> RankNotes:
        """Return the notes of this set of ranks, or of an earlier one. folder: the launcher's;
        without one nothing is noted.
        """
        if folder is None:
            return NoNotes()
        return RankNotes(
            Path(folder),
            attempt=self.attempt - attempts_ago,
            first_rank=self.local_ranks.start,
        )

    def exit_report(self, gone: Sequence[int], error: Exception | None) -> ExitReport:
        """Why this rank ends. gone: ranks of this machine that have ended before it."""
        if gone:
            why = f"rank {', '.join(map(str, gone))} was gone"
            return ExitReport(why=why, rank=gone[0], is_seen_only=True)
        cause = f"{type(error).__name__}: {str(error)[:500]}"
        if self.is_one_of_several:
            why = f"rank {self.rank} lost a rank on another machine, or failed: {cause}"
            return ExitReport(why=why)
        return ExitReport(why=f"rank {self.rank} failed: {cause}", rank=self.rank)


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, value: int) -> int: ...

    def check(self, keys: list[str]) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class RendezvousStale(Exception):
    """This store belongs to a rendezvous that is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """The machines of one host, as one of their ranks sees them."""

    endpoint: tuple[str, int]
    """Host and port of rank 0's store."""
    rank: int
    world_size: int
    local_world_size: int
    within_s: float
    """Longest wait for the others."""
    key: str = ""
    """Secret of all machines."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What must be the same on all machines, by argument."""

    @classmethod
    def of(cls, settings: Settings, place: Place, facts: Mapping[str, str]) -> "Machines":
        return cls(
            endpoint=split_endpoint(settings.rdzv_endpoint or ""),
            rank=place.rank,
            world_size=place.world_size,
            local_world_size=place.local_world_size,
            within_s=settings.node_timeout,
            key=settings.rdzv_key or "",
            facts=facts,
        )

    def restarted(self, machine: int) -> ExitReport:
        """What the other ranks read when this one joins a rendezvous twice."""
        return ExitReport(
            why=f"machine {machine} was started again", rank=self.rank, is_seen_only=True
        )

    def meet(
        self,
        open_store: Callable[..., Store],
        *,
        ending: ExitReport,
        tell: Callable[[str], None] = lambda waiting_for: None,
        still_waiting: Callable[[], None] = lambda: None,
    ) -> Store:
        """Return the store once every rank has joined. ConfigError if one does not join in time, or
        was started with other arguments.

        open_store(host, port, is_here=, timeout_s=): RuntimeError if it cannot be reached. ending:
        why this rank's last process ended. tell: called with what is missing, whenever that
        changes. still_waiting: called in every round.
        """
        deadline = time.monotonic() + self.within_s
        told = ""
        while True:
            waiting_for = f"machine 0 at {self._address}"
            # nobody is there yet, or left while we asked
            with contextlib.suppress(RendezvousStale, RuntimeError, OSError):
                store = self._open(open_store)
                nonce = self._join(store, ending)
                while waiting_for := self._missing(store, nonce):
                    told = _tell(tell, waiting_for, told)
                    self._go_on_waiting(still_waiting, deadline, waiting_for)
                if self.rank == 0:
                    store.set("all", "here")
                return store
            told = _tell(tell, waiting_for, told)
            self._go_on_waiting(still_waiting, deadline, waiting_for)

    def _open(self, open_store: Callable[..., Store]) -> Store:
        return open_store(*self.endpoint, is_here=self.rank == 0, timeout_s=CONNECT_WITHIN_S)

    def _join(self, store: Store, ending: ExitReport) -> str:
        """Join the rendezvous and return its nonce."""
        if store.check([ENDED]):
            raise RendezvousStale
        if self.rank == 0:
            facts = json.dumps({**self.facts, NONCE: secrets.token_hex(16)})
            store.set("facts", self._proof(facts) + facts)
        store.wait(["facts"], timedelta(seconds=CONNECT_WITHIN_S))
        facts = self._read_facts(store)
        self._require_same(facts)
        if store.add(f"joined/{self.rank}", 1) > 1:
            store.set(ENDED, ending.to_text())
            raise RendezvousStale
        store.set(f"here/{self.rank}", self._proof_of(self.rank, facts[NONCE]))
        return facts[NONCE]

    def _read_facts(self, store: Store) -> dict[str, str]:
        """What rank 0 wrote. ConfigError if it has another key, or is not rank 0."""
        written = store.get("facts").decode(errors="replace")
        proof, facts = written[:PROOF_CHARS], written[PROOF_CHARS:]
        if not hmac.compare_digest(proof.encode(), self._proof(facts).encode()):
            raise ConfigError(
                f"what answers at {self._address} has another --rdzv_key than this machine. Start "
                "all machines with the same one, and check --rdzv_endpoint."
            )
        return json.loads(facts)

    def _proof(self, text: str) -> str:
        """Return what only who has the key can write about this text."""
        return hmac.new(self.key.encode(), text.encode(), hashlib.sha256).hexdigest()

    def _proof_of(self, rank: int, nonce: str) -> str:
        """Return how this rank proves, in this rendezvous, that it has the key."""
        return self._proof(f"rank {rank} of {nonce}")

    def _is_here(self, rank: int, store: Store, nonce: str) -> bool:
        """Whether a rank has joined. What a stranger writes in its place does not count."""
        key = f"here/{rank}"
        return store.check([key]) and hmac.compare_digest(
            store.get(key), self._proof_of(rank, nonce).encode()
        )

    def _require_same(self, facts: Mapping[str, str]) -> None:
        for name, theirs in facts.items():
            if name != NONCE and (mine := self.facts.get(name)) != theirs:
                raise ConfigError(
                    f"{name} is {mine} on this machine and {theirs} on machine 0. Start all "
                    "machines with the same arguments except --node_rank, and with the same files "
                    "at the same paths."
                )

    def _missing(self, store: Store, nonce: str) -> str:
        """The machines that have not joined; empty once all have. RendezvousStale if a rank was
        restarted meanwhile.
        """
        if store.check([ENDED]):
            raise RendezvousStale
        absent = [rank for rank in range(self.world_size) if not self._is_here(rank, store, nonce)]
        if not absent:
            return "" if self.rank == 0 or store.check(["all"]) else "machine 0"
        numbers = sorted({rank // self.local_world_size for rank in absent})
        names = ", ".join(map(str, numbers))
        return (
            f"machine{'s' if len(numbers) > 1 else ''} {names} of "
            f"{self.world_size // self.local_world_size} to join {self._address}"
        )

    def _go_on_waiting(
        self, still_waiting: Callable[[], None], deadline: float, waiting_for: str
    ) -> None:
        still_waiting()
        if time.monotonic() > deadline:
            raise ConfigError(
                f"waited {self.within_s:g} s for {waiting_for} (--node_timeout). Start every "
                "machine with its own --node_rank, check that they can reach each other, or use "
                "fewer (--nnodes)."
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


def choose_interface(endpoint: tuple[str, int], environ: MutableMapping[str, str]) -> None:
    """Let gloo and NCCL use the interface towards an address, unless the user chose one.

    By default they use the interface of the machine's own name, which is often the loopback.
    """
    if (interface := interface_towards(endpoint)) is not None:
        for name in INTERFACE_VARIABLES:
            environ.setdefault(name, interface)


def interface_towards(endpoint: tuple[str, int]) -> str | None:
    """The network interface that leads to an address; None if that is unknown."""
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
