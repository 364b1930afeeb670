"""What a host speaks beside its own API: other dialects, and one of the two protocols of the
existing clients (docs/compat.md).
"""

from collections.abc import Mapping
from typing import Any

from backends.errors import UnavailableError
from hosts.compat import routes, v2_routes
from hosts.compat.v2_fields import v1_fields
from hosts.dialects import a1111, openai
from hosts.http.dialect import Dialect
from hosts.jobs.queue import JobQueue
from hosts.ranks.model_control import ModelControl
from hosts.supervision.host_state import HostState, Phase


class FixedModel:
    """v1: the model is named on the command line, and stays."""

    dialects: tuple[Dialect, ...] = (openai.DIALECT, *a1111.DIALECTS, routes.DIALECT)

    def __init__(self, control: ModelControl | None = None) -> None:
        """control: left alone, so that both protocols are made alike."""

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The body of /generate in v1's names."""
        return body

    def percent(self, queue: JobQueue, state: HostState) -> float:
        """What /progress shows."""
        return queue.percent

    def require_pipeline(self, state: HostState) -> None:
        """UnavailableError if a job cannot even wait. Here it waits while the model loads."""


class ModelOverHttp:
    """v2: the host starts without a model, which POST /apply loads, changes and unloads."""

    dialects: tuple[Dialect, ...] = (*FixedModel.dialects, v2_routes.DIALECT)

    def __init__(self, control: ModelControl) -> None:
        self.control = control

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The body of /generate in v1's names."""
        return v1_fields(body)

    def percent(self, queue: JobQueue, state: HostState) -> float:
        """What /progress shows: of loading unless there are jobs."""
        is_serving = state.phase is Phase.READY and queue.jobs()
        return queue.percent if is_serving else state.loading_percent

    def require_pipeline(self, state: HostState) -> None:
        """UnavailableError if a job cannot even wait."""
        if state.phase is not Phase.READY:
            raise UnavailableError(
                state.reason or "no pipeline is ready. Send its configuration to POST /apply."
            )
