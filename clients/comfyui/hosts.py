"""The host of a workflow: one at an address, or one that is started here when it is needed."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from diffusion_client import Client, HostError
from diffusion_client.local import LocalHost

DEFAULT_ADDRESS = "http://127.0.0.1:6000"
LOOK_TIMEOUT_S = 0.5
"""ComfyUI requests the lists whenever its page loads, also while no host runs."""
ANY = "any"

_started: dict[str, LocalHost] = {}
"""Address -> host that this process started there. They end with ComfyUI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostChoice:
    """The loader node's output, which samplers take."""

    address: str
    model: str = ANY
    arguments: str | None = None  # for starting a host if none answers; None: never start one
    api_key: str = ""

    def client(self, look: Callable[[], None] = lambda: None) -> Client:
        """Return a client of the host once it is ready. HostError if there is no host.

        `look` is called while the host loads, and may raise.
        """
        client = Client(self.address, api_key=self.api_key or None)
        if self.arguments is not None:
            self._start(client, look)
        served = client.models()
        if self.model not in (ANY, *served):
            raise HostError(
                f"the host at {self.address} serves {', '.join(served)}, not {self.model}. Choose "
                "it, or another host.",
                status=0,
            )
        return client

    def _start(self, client: Client, look: Callable[[], None]) -> None:
        """Start a host unless one answers there.

        A host that was started here with other arguments is stopped first.
        """
        arguments = _with_port(self.arguments or "", self.address)
        ours = _started.get(self.address)
        if ours is not None and (not ours.is_running or ours.arguments != arguments):
            _started.pop(self.address).stop()
        if self.address not in _started:
            if _answers(client):
                return
            _started[self.address] = LocalHost(*arguments)
        _started[self.address].wait_until_ready(look)


def models(address: str = DEFAULT_ADDRESS) -> list[str]:
    """Return the models that the host serves; empty if it does not answer."""
    try:
        return Client(address, timeout_s=LOOK_TIMEOUT_S).models()
    except HostError:
        return []


def schedulers(address: str = DEFAULT_ADDRESS) -> list[str]:
    """Return the host's schedulers for its model; empty if it does not answer."""
    try:
        request = Client(address, timeout_s=LOOK_TIMEOUT_S).request_schema()
    except HostError:
        return []
    return list(request["properties"]["scheduler"].get("examples", []))


def stop_all() -> None:
    """Stop all hosts that were started here."""
    while _started:
        _started.popitem()[1].stop()


def _with_port(arguments: str, address: str) -> Sequence[str]:
    parts = urlsplit(address)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise HostError(
            f"{address} is not this machine, so no host can be started there. Start it there by "
            "hand.",
            status=0,
        )
    return (*shlex.split(arguments), f"--port={parts.port or 80}")


def _answers(client: Client) -> bool:
    try:
        client.health()
    except HostError as error:
        if error.status:
            raise
        return False
    return True
