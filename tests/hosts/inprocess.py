"""A whole host of one rank inside the test process: application, listener on a real socket, and
model loop in a thread.
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
from hosts.compat.protocol import FixedModel
from hosts.http.app import Host, create_app
from hosts.http.server import Listener
from hosts.jobs.queue import JobQueue
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from hosts.ranks.model_control import Apply, ModelControl
from hosts.ranks.model_loop import LeaderControl, ModelLoop
from hosts.supervision.host_state import HostState, Phase
from tests.hosts.harness import free_port, session, wait_until


class InProcessHost:
    """Used as a context manager. Settings by their launch names; the checkpoint must be given."""

    def __init__(self, **settings: Any) -> None:
        self.port = free_port()
        self.settings = Settings.from_values(
            # images are compared bit by bit, and a batch adds in another order
            {"port": self.port, "height": 64, "width": 64, "max_batch": 1, **settings}
        )
        start = plan_start(self.settings, read_table(), num_gpus=0, num_ranks=1)
        self.spec = start.spec
        self.state, self.queue = HostState(), JobQueue()
        host = Host(
            settings=self.settings,
            spec=start.spec,
            queue=self.queue,
            state=self.state,
            protocol=FixedModel(),
        )
        self._listener = Listener(create_app(host), host="127.0.0.1", port=self.port)
        control = ModelControl(
            self.queue, base=self.settings, plan=lambda settings: start, num_ranks=1
        )
        loop = ModelLoop(
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            plan=lambda settings, measured: start,
            control=LeaderControl(
                control=control, queue=self.queue, state=self.state, is_fixed=True
            ),
        )
        self._loop = threading.Thread(
            target=loop.run, args=(Apply(settings=self.settings),), daemon=True
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
