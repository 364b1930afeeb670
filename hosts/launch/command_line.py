"""The launcher's command line and --config file -> Settings, strictly. The arguments themselves are
declared in hosts/launch/settings.py.
"""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from backends.errors import ConfigError
from backends.options import parse_switch
from hosts.launch.settings import SECTIONS, Settings, canonical_names, option_fields


def parse_command_line(argv: Sequence[str]) -> Settings:
    """Strict: an unknown or malformed argument is a ConfigError that names the closest one. --help
    prints and exits.
    """
    spoken = vars(_parser().parse_args([_underscored(token) for token in argv]))
    values = {name: value for name, value in spoken.items() if value is not None}
    if "config" in values:
        values = {**read_config(Path(values["config"])), **values}
    return Settings.from_values(values)


def read_config(path: Path) -> dict[str, Any]:
    """The YAML file's values by canonical name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(
            f"--config={path} cannot be read: {error.strerror}. Give a YAML file."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--config={path} is not YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config={path} must hold 'name: value' lines, not a {type(content).__name__}."
        )
    return by_canonical_name(content, source=f"--config={path}")


def by_canonical_name(content: Mapping[Any, Any], *, source: str) -> dict[str, Any]:
    """The same values under the names of Settings. ConfigError names `source` and the first key
    that is none.
    """
    names = canonical_names()
    values = {}
    for key, value in content.items():
        spelling = str(key).replace("-", "_")
        if spelling not in names:
            raise ConfigError(f"{source} has an unknown name {key!r}.{_closest(spelling)}")
        values[names[spelling]] = value
    return values


def _underscored(token: str) -> str:
    """--warm-up-steps=3 -> --warm_up_steps=3; values are left alone."""
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _closest(spelling: str) -> str:
    close = difflib.get_close_matches(spelling, canonical_names(), n=1)
    return f" Did you mean --{close[0]}?" if close else " See --help."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        spoken, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ConfigError(
                f"{unknown[0]} is not an argument of this "
                f"command.{_closest(unknown[0].partition('=')[0].lstrip('-'))}"
            )
        return spoken


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launcher.py",
        allow_abbrev=False,
        description="Serve one diffusion model on several GPUs over HTTP.",
        epilog=(
            "Example: python launcher.py --type=sdxl --port=6000. In names, '-' and '_' are "
            "the "
            "same."
        ),
    )
    groups = {section: parser.add_argument_group(section) for section in SECTIONS}
    for name, declared in option_fields().items():
        data = declared.metadata
        spellings = [f"--{spelling}" for spelling in (name, *data["aliases"])]
        text = data["text"] + (
            f" Default: {declared.default}." if declared.default not in (None, False) else ""
        )
        text += f" ({data['pending']})" if data["pending"] else ""
        value: dict[str, Any] = {"metavar": data["metavar"] or "VALUE"}
        if data["parse"] is parse_switch:
            value = {"nargs": "?", "const": "true", "metavar": "BOOL"}
        groups[data["section"]].add_argument(
            *spellings, dest=name, default=None, help=text.replace("%", "%%"), **value
        )
    return parser
