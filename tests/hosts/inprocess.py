"""A whole host of one rank inside the test process: application, listener on a real socket, and
rank loop in a thread.
"""

import inspect
import threading
from types import TracebackType
from typing import Any, Self

import diffusers
import requests
import torch

from backends.errors import UnavailableError
from backends.model_table import read_table
from backends.parallel.distributed import Mesh
from hosts.dialects.catalogue import application
from hosts.http.app import Host
from hosts.http.server import Listener
from hosts.jobs.policy import Sharing
from hosts.jobs.queue import JobQueue
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from hosts.ranks.dispatch import LeaderDispatcher
from hosts.ranks.loop import RankLoop
from hosts.supervision.host_state import HostState, Phase
from tests.hosts.harness import free_port, session, wait_until


class InProcessHost:
    """Used as a context manager. Settings by their launch names; the checkpoint must be given."""

    def __init__(self, **settings: Any) -> None:
        self.port = free_port()
        self.settings = Settings.from_values(
            {"port": self.port, "height": 64, "width": 64, **settings}
        )
        start = plan_start(self.settings, read_table(), num_gpus=0, num_ranks=1)
        self.spec = start.spec
        self.state, self.queue = HostState(), JobQueue()
        self._listener = Listener(
            application(
                Host(settings=self.settings, spec=start.spec, queue=self.queue, state=self.state)
            ),
            host="127.0.0.1",
            port=self.port,
        )
        mesh = Mesh(start.plan, rank=0, device=torch.device("cpu"))
        sharing = Sharing(spec=start.spec, load=start.load)
        dispatcher = LeaderDispatcher(
            load=start.load, queue=self.queue, state=self.state, sharing=sharing
        )
        self._loop = threading.Thread(
            target=RankLoop(rank=0, spec=start.spec, mesh=mesh, dispatcher=dispatcher).run,
            daemon=True,
        )
        self.parameters = inspect.signature(
            getattr(diffusers, start.spec.pipeline).__call__
        ).parameters
        self._session = session()

    def __enter__(self) -> Self:
        self._listener.bind()
        self._listener.serve()
        self._loop.start()
        wait_until(lambda: self.state.phase is not Phase.LOADING, within_s=120, what="loaded")
        assert self.state.phase is Phase.READY, self.state.reason
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.queue.close(UnavailableError("the test is over"))
        self._loop.join(timeout=60)
        self._session.close()
        self._listener.stop()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def post(self, body: Any, **kwargs: Any) -> requests.Response:
        return self._session.post(self.url("/generate"), json=body, timeout=120, **kwargs)

    def generate_image(self, body: Any) -> dict[str, Any]:
        """The answer's body, which must be a success."""
        answer = self.post(body)
        assert answer.status_code == 200, answer.json()["message"]
        return answer.json()
