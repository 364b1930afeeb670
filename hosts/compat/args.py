"""Command lines of existing clients -> the same Settings as the launcher's. Tolerant, because
neither client notices a host that exits.

Unknown arguments only warn; empty values count as not given; '-' and '_' are equal; no
abbreviations. A value that cannot be meant is a ConfigError, which the host then answers to every
request.
"""

import logging
import tempfile
from collections.abc import Sequence

from backends.errors import ConfigError
from backends.options import parse_switch
from hosts.launch.settings import Settings, canonical_names, option_fields

logger = logging.getLogger(__name__)

OFF_VALUES = frozenset({"", "none", "disabled", "default", "null"})
"""Texts by which clients say that nothing was chosen."""
MEANS_OFF = {"quantize_tokenizer", "quantize_scheduler"}
"""There is nothing to quantise in these: clients may say so, and it changes nothing."""


def parse_client_arguments(argv: Sequence[str], *, backend: str) -> Settings:
    """Settings for a host script of `backend`. Requests may name image files in the system's
    temporary folder, as LocalAI does.
    """
    names = canonical_names()
    values: dict[str, str] = {}
    for spelling, value in _pairs(argv):
        if spelling not in names:
            logger.warning("--%s is not an argument of this host: ignored", spelling)
            continue
        name = names[spelling]
        if name in MEANS_OFF:
            logger.warning("--%s has no effect: there are no weights in it", spelling)
            continue
        text = "true" if value is None and _is_switch(name) else value
        if text is not None and text.strip().lower() not in OFF_VALUES:
            values[name] = text
    return Settings.from_values({"image_dirs": tempfile.gettempdir(), **values, "backend": backend})


def _pairs(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """--key=value, --key value and bare --key; anything else only warns."""
    pairs: list[tuple[str, str | None]] = []
    for token in argv:
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            pairs.append((key.replace("-", "_"), value if equals else None))
        elif (
            pairs
            and pairs[-1][1] is None
            and not _is_switch(canonical_names().get(pairs[-1][0], ""))
        ):
            pairs[-1] = (pairs[-1][0], token)
        else:
            logger.warning("%r is not an argument of this host: ignored", token)
    return pairs


def _is_switch(name: str) -> bool:
    return name in option_fields() and option_fields()[name].metadata["parse"] is parse_switch


def settings_or_problem(
    argv: Sequence[str], *, backend: str
) -> tuple[Settings, ConfigError | None]:
    """The settings, or those of a host that can only say what is wrong: on the port the client
    asked for.
    """
    try:
        return parse_client_arguments(argv, backend=backend), None
    except ConfigError as error:
        kept = [f"--{name}={value}" for name, value in _pairs(argv) if name in ("port", "type")]
        try:
            return parse_client_arguments(kept, backend=backend), error
        except ConfigError:
            return Settings(backend=backend), error
