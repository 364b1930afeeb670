"""What a host serves besides its own API: other dialects and one protocol of the existing clients.

docs/compat.md describes both protocols.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flask import Flask

from backends.errors import UnavailableError
from hosts.compat import routes, v2_routes
from hosts.compat.v2_fields import COUNTED, v1_fields
from hosts.dialects import a1111, openai
from hosts.dialects.models import create_front
from hosts.http.app import Host, create_app
from hosts.http.dialect import Dialect
from hosts.jobs.queue import JobQueue
from hosts.jobs.store import Store
from hosts.ranks.model_control import ModelControl
from hosts.supervision.host_state import HostState, Phase


class FixedModel:
    """v1: the command line names the model, or the models among which requests choose."""

    renamed: Mapping[str, str] = MappingProxyType({})
    """Field of /generate -> the name that the protocol has for it instead of v1's."""
    dialects: tuple[Dialect, ...] = (openai.DIALECT, *a1111.DIALECTS, routes.DIALECT)

    def __init__(self, control: ModelControl | None = None) -> None:
        """control: unused, so that both protocols take the same arguments."""

    def application(self, hosts: Sequence[Host], store: Store) -> Flask:
        """Return the application: of the host, or in front of one for each of several models."""
        if len(hosts) == 1:
            return create_app(hosts[0])
        apps = {host.name: create_app(host) for host in hosts}
        metrics = apps[hosts[0].name].extensions["metrics"]
        for app in apps.values():
            app.extensions["metrics"] = metrics  # they share one queue
        return create_front(apps, store)

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the body of /generate in v1's names."""
        return body

    def percent(self, queue: JobQueue, state: HostState, *, owner: str | None) -> float:
        """Return the value of /progress."""
        return queue.percent(owner=owner)

    def require_pipeline(self, state: HostState) -> None:
        """Raise UnavailableError if a job cannot even wait. It may wait while the model loads."""


class ModelOverHttp:
    """v2: the host starts without a model. POST /apply loads, changes and unloads it."""

    renamed: Mapping[str, str] = MappingProxyType(COUNTED)
    dialects: tuple[Dialect, ...] = (*FixedModel.dialects, v2_routes.DIALECT)

    def __init__(self, control: ModelControl) -> None:
        self.control = control

    def application(self, hosts: Sequence[Host], store: Store) -> Flask:
        return create_app(hosts[0])

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the body of /generate in v1's names."""
        return v1_fields(body)

    def percent(self, queue: JobQueue, state: HostState, *, owner: str | None) -> float:
        """Return the value of /progress: of loading unless there are jobs."""
        is_serving = state.phase is Phase.READY and queue.jobs(owner=owner)
        return queue.percent(owner=owner) if is_serving else state.loading_percent

    def require_pipeline(self, state: HostState) -> None:
        """Raise UnavailableError if a job cannot even wait."""
        if state.phase is not Phase.READY:
            raise UnavailableError(
                state.reason or "no pipeline is ready. Send its configuration to POST /apply."
            )
