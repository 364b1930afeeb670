"""Which host a workflow uses: one at an address, or one that is started here when an image is asked
for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from diffusion_client import PATIENCE_S, Client, HostError
from diffusion_client.local import LocalHost

from .keys import key_of
from .launch_arguments import read_arguments

DEFAULT_ADDRESS = "http://127.0.0.1:6000"
ANY = "any"

_started: dict[str, LocalHost] = {}
"""Address -> the host that this process started there. They end with ComfyUI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostChoice:
    """What the loader node hands to samplers. arguments: with which to start a host if none
    answers; None: never start one. patience_s: how long a job waits for a host that restarts.
    """

    address: str
    model: str = ANY
    arguments: str | None = None
    patience_s: float = PATIENCE_S

    def client(self, look: Callable[[], None] = lambda: None) -> Client:
        """A client of the host, which is ready. `look` is called while it loads, and may raise.
        HostError if there is none.
        """
        client = Client(
            self.address,
            api_key=key_of(self.address),
            patience_s=self.patience_s,
            during_outage=self._require_started,
            model=None if self.model == ANY else self.model,
        )
        if self.arguments is not None:
            self._start(client, look)
        served = client.models()
        if self.model not in (ANY, *served):
            raise HostError(
                f"the host at {self.address} serves {', '.join(served)}, not {self.model}. Choose "
                "it, or another host.",
                status=400,
            )
        return client

    def _require_started(self) -> None:
        """HostError if a host that was started here has ended: waiting would not help."""
        if (ours := _started.get(self.address)) is not None:
            ours.require_running()

    def _start(self, client: Client, look: Callable[[], None]) -> None:
        """Unless somebody answers there. A host that was started here with other arguments is ended
        first.
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


def stop_all() -> None:
    """End what was started here."""
    while _started:
        _started.popitem()[1].stop()


def _with_port(arguments: str, address: str) -> Sequence[str]:
    parts = urlsplit(address)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise HostError(
            f"{address} is not this machine, so no host can be started there. Start it there by "
            "hand.",
            status=400,
        )
    return (*read_arguments(arguments), f"--port={parts.port or 80}")


def _answers(client: Client) -> bool:
    try:
        client.health()
    except HostError as error:
        if error.status:
            raise
        return False
    return True
