"""How ranks of several machines meet over a real store: who is waited for, who is refused, who has
come before.
"""

import threading
import time

import pytest

from backends.errors import ConfigError
from backends.groups.control_group import open_store
from hosts.launch.option import split_endpoint
from hosts.launch.settings import Settings
from hosts.supervision.exit_reports import ExitReport
from hosts.supervision.rendezvous import Machines, interface_towards
from tests.hosts.harness import free_port, wait_until

ENDING = ExitReport(why="rank 1 was killed by SIGSEGV", rank=1)


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr("hosts.supervision.rendezvous.CONNECT_WITHIN_S", 0.7)
    return "127.0.0.1", free_port()


KEY = "a secret of all machines"


def machines(endpoint, rank, *, within_s=20.0, key=KEY, **facts):
    return Machines(
        endpoint=endpoint,
        rank=rank,
        world_size=4,
        local_world_size=2,
        within_s=within_s,
        key=key,
        facts=facts,
    )


class Coming(threading.Thread):
    """One rank that meets the others. store, error: how it ended; told: what it waited for."""

    def __init__(self, *args, **kwargs):
        super().__init__(daemon=True)
        self._machines = machines(*args, **kwargs)
        self.store, self.error, self.told = None, None, []
        self.start()

    def run(self):
        try:
            self.store = self._machines.meet(open_store, ending=ENDING, tell=self.told.append)
        except ConfigError as error:
            self.error = str(error)


def test_all_go_on_when_the_last_has_come_and_not_before(endpoint):
    host, port = endpoint
    ranks = [Coming(endpoint, 2)]
    wait_until(
        lambda: ranks[0].told == [f"waiting for machine 0 at {host}:{port}"],
        within_s=20,
        what="0 is missed",
    )
    ranks.append(Coming(endpoint, 0))
    wait_until(
        lambda: f"waiting for machines 0, 1 of 2 to join {host}:{port}" in ranks[1].told,
        within_s=20,
        what="0 and 1 are missed",
    )
    ranks.append(Coming(endpoint, 1))
    wait_until(
        lambda: ranks[1].told[-1] == f"waiting for machine 1 of 2 to join {host}:{port}",
        within_s=20,
        what="one rank is missed",
    )
    assert not any(rank.store for rank in ranks)
    ranks.append(Coming(endpoint, 3))
    for rank in ranks:
        rank.join(timeout=20)
    assert all(rank.store for rank in ranks)
    # one of them is started again: it tells the others through this store, and waits for the next
    # one
    again = Coming(endpoint, 3)
    wait_until(
        lambda: ranks[1].store.check(["watch/ended"]), within_s=20, what="the others are told"
    )
    assert ExitReport.from_text(ranks[1].store.get("watch/ended").decode()) == ENDING
    assert again.is_alive() and again.store is None


@pytest.mark.parametrize(
    ("rank", "whom"), [(0, "machines 0, 1 of 2 to join {}:{}"), (2, "machine 0 at {}:{}")]
)
def test_nobody_waits_longer_than_the_limit(rank, whom, endpoint):
    coming = Coming(endpoint, rank, within_s=0.5)
    coming.join(timeout=20)
    assert coming.error.startswith(
        f"waited 0.5 s for {whom.format(*endpoint)} (--node_timeout). Start every machine with its "
        "own --node_rank"
    )


def test_machine_with_other_arguments_is_refused_and_the_right_one_can_still_come(endpoint):
    first = Coming(endpoint, 0, **{"--height": "64", "--checkpoint": "/m"})
    wrong = Coming(endpoint, 2, **{"--height": "128", "--checkpoint": "/m"})
    wrong.join(timeout=20)
    assert wrong.error.startswith(
        "--height is 128 on this machine and 64 on machine 0. Start all machines with the same "
        "arguments"
    )
    right = [
        Coming(endpoint, rank, **{"--height": "64", "--checkpoint": "/m"}) for rank in (1, 2, 3)
    ]
    for rank in (first, *right):
        rank.join(timeout=20)
        assert rank.store


def test_machine_with_another_key_is_refused_and_the_right_one_can_still_come(endpoint):
    first = Coming(endpoint, 0)
    wrong = Coming(endpoint, 2, key="another secret of all machines")
    wrong.join(timeout=20)
    assert "has another --rdzv_key than this machine" in wrong.error
    right = [Coming(endpoint, rank) for rank in (1, 2, 3)]
    for rank in (first, *right):
        rank.join(timeout=20)
        assert rank.store


def test_what_a_stranger_writes_into_the_store_counts_for_nobody(endpoint, monkeypatch):
    """Neither in place of a rank, nor in place of the facts of rank 0."""
    monkeypatch.setattr("hosts.supervision.rendezvous.CONNECT_WITHIN_S", 10.0)
    ranks = [Coming(endpoint, rank) for rank in (0, 1, 2)]
    wait_until(
        lambda: any("machine 1 of 2" in told for told in ranks[0].told), within_s=20, what="waits"
    )
    stranger = open_store(*endpoint, is_here=False, timeout_s=5)
    stranger.set("here/3", stranger.get("here/2"))
    time.sleep(1)
    assert not any(rank.store for rank in ranks)
    facts = stranger.get("facts")
    stranger.set("facts", b"0" * 64 + facts[64:])
    late = Coming(endpoint, 3)
    late.join(timeout=20)
    assert "has another --rdzv_key" in late.error
    stranger.set("facts", facts)
    ranks.append(Coming(endpoint, 3))
    for rank in ranks:
        rank.join(timeout=20)
        assert rank.store


@pytest.mark.parametrize("text", ["somewhere", ":29500", "host:", "host:99999", "host:x"])
def test_endpoint_is_a_host_and_a_port(text):
    with pytest.raises(ConfigError, match=r"is not allowed\. Allowed: HOST:PORT"):
        Settings.from_values({"rdzv_endpoint": text})
    assert split_endpoint("10.0.0.1:29500") == ("10.0.0.1", 29500)
    assert split_endpoint("[fd00::1]:29500") == ("fd00::1", 29500)


def test_interface_is_the_one_that_leads_to_the_first_machine():
    assert interface_towards(("127.0.0.1", 29500)) == "lo"
    assert interface_towards(("no such host", 29500)) is None
