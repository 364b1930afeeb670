"""How one launch argument is declared; hosts/launch/settings.py is the table of all. Imports no
torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backends import BACKEND_NAMES, plan_module
from backends.options import Option as BackendOption
from backends.options import parse_switch

SECTIONS = {
    "common": "The ten that people use first",
    "proxies": "Behind a proxy",
    "jobs": "Jobs",
    "process": "The host's processes",
    "limits": "Limits of requests",
    "model": "Model",
    "adapters": "Adapters",
    "quantization": "Quantization",
    "compile": "torch.compile",
    "memory": "Memory",
    **{name: f"Backend {name}" for name in BACKEND_NAMES if plan_module(name).OPTIONS},
    "machines": "Several machines",
    "cluster": "Several hosts behind a gateway",
    "old": "Old spellings",
}
"""Section -> its title. The order is that of --help and docs/arguments.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """The declaration of one launch argument."""

    name: str = ""
    """The name of its field in Settings."""
    section: str
    default: Any
    """None means not given."""
    parse: Callable[[str], Any]
    """Text -> value. Its ValueError says what is allowed."""
    text: str
    """The meaning: a noun phrase or an imperative, with unit, values and the default's meaning."""
    metavar: str
    aliases: tuple[str, ...]
    """Other spellings: older names, and those of the existing clients."""
    backends: tuple[str, ...]
    """The backends that read it; empty if it is not a matter of backends."""

    @property
    def is_switch(self) -> bool:
        return self.parse is parse_switch


def declare(
    section: str,
    default: Any,
    parse: Callable[[str], Any],
    text: str,
    *,
    metavar: str = "VALUE",
    aliases: tuple[str, ...] = (),
    backends: tuple[str, ...] = (),
) -> Any:
    """A field of Settings. backends: those that read it; none for the host's own."""
    option = Option(
        section=section,
        default=default,
        parse=parse,
        text=text,
        metavar=metavar,
        aliases=aliases,
        backends=backends,
    )
    return field(default=default, metadata={"option": option})


def declare_backend_option(backend: str, option: BackendOption) -> Any:
    """A field of Settings for an option that a backend declares in its own folder."""
    also = [name for name in BACKEND_NAMES if option.name in plan_module(name).READS]
    return declare(
        backend,
        option.default,
        option.parse,
        option.text,
        metavar=option.metavar or "VALUE",
        aliases=option.aliases,
        backends=(backend, *also),
    )
