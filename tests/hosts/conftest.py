"""Fixtures that several files share: the application over Flask's client, and queues with a
store.
"""

import pytest

from backends.errors import UnavailableError
from hosts.jobs import store
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import JobStore
from hosts.supervision.host_state import HostState, Phase
from tests.hosts.application import make_client


@pytest.fixture
def queue():
    made = JobQueue()
    yield made
    made.close(UnavailableError("the test is over"))


@pytest.fixture
def state():
    made = HostState()
    made.become(Phase.READY)
    return made


@pytest.fixture
def client(queue, state):
    return make_client(queue, state)


@pytest.fixture
def open_queue(tmp_path, monkeypatch):
    """A queue on the store of one folder; opening the next one is the death of the one before, as
    the disk sees it.
    """
    monkeypatch.setattr(store, "LOCK_PATIENCE_S", 0.0)
    opened = []

    def open_queue(**settings):
        if opened:
            opened.pop().close()
        opened.append(JobStore(tmp_path / "state"))
        return JobQueue(store=opened[0], **settings)

    yield open_queue
    for one in opened:
        one.close()
