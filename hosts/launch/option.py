"""How one launch argument is declared; hosts/launch/settings.py is the table of all. Imports no
torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from backends import BACKEND_NAMES
from hosts.launch.parsers import parse_switch

SECTIONS = {
    "common": "The ten that people use first",
    "jobs": "Jobs",
    "process": "The host's processes",
    "limits": "Limits of requests",
    "model": "Model",
    "adapters": "Adapters",
    "quantization": "Quantization",
    "compile": "torch.compile",
    "memory": "Memory",
    "asyncdiff": "Backend asyncdiff",
    "distrifuser": "Backend distrifuser",
    "xdit": "Backend xdit",
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
    also: tuple[str, ...] = (),
) -> Any:
    """A field of Settings. also: backends that read it besides the one that the section is for."""
    option = Option(
        section=section,
        default=default,
        parse=parse,
        text=text,
        metavar=metavar,
        aliases=aliases,
        backends=(section, *also) if section in BACKEND_NAMES else (),
    )
    return field(default=default, metadata={"option": option})
