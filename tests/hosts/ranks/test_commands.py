"""Commands between real ranks."""

from collections.abc import Callable
from typing import Any

import pytest

from backends.errors import UnavailableError
from backends.groups.control_group import broadcast_command
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from hosts.jobs.decision import take_first
from hosts.jobs.policy import Sharing
from hosts.jobs.queue import JobQueue, JobStatus
from hosts.ranks.commands import give_next
from hosts.ranks.dispatch import FollowerDispatcher, JobDispatcher
from hosts.supervision.host_state import HostState

LOAD = LoadRequest(model_type="sdxl", checkpoint="/none", variant="fp32")


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def check_requests(rank: int, world_size: int) -> None:
    """Rank 0 has three jobs, two of which cannot be sent."""
    queue = JobQueue()
    sharing = Sharing(spec=read_table()["sdxl"], load=LOAD, world_size=2)
    front = JobDispatcher(
        queue=queue, state=HostState(), sharing=sharing, ranks=2, choose=take_first
    )
    jobs = [
        queue.submit(GenerateRequest(prompt="a", scheduler=nested(depth)))
        for depth in (5000, 900, 1)
    ]
    dispatcher = front if rank == 0 else FollowerDispatcher()
    command = give_next(
        lambda: dispatcher.next_command(lambda request, methods: None),
        broadcast_command,
        lambda outcome: dispatcher.generated([], outcome),
        rank=rank,
    )
    assert [request.scheduler for request in command.requests] == [nested(1)]
    if rank == 0:
        assert [job.status for job in jobs] == [
            JobStatus.FAILED,
            JobStatus.FAILED,
            JobStatus.RUNNING,
        ]
        assert "cannot be sent to the other ranks" in str(jobs[0].error)
        queue.close(UnavailableError("the test is over"))


@pytest.mark.timeout(60)
def test_request_that_cannot_be_sent_fails_its_job_and_the_ranks_go_on(
    run_on_ranks: Callable[..., None],
) -> None:
    run_on_ranks(check_requests, 2)
