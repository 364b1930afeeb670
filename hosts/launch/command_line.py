"""The launcher's command line and --config file -> Settings, strictly. hosts/launch/settings.py
declares the arguments. Imports no torch.
"""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from backends.errors import ConfigError
from hosts.launch.option import SECTIONS, Option
from hosts.launch.settings import Settings, canonical_names, options


def parse_command_line(argv: Sequence[str]) -> Settings:
    """ConfigError for an unknown or malformed argument, with the closest name. --help prints and
    exits.
    """
    parsed = vars(_parser().parse_args([_underscored(token) for token in argv]))
    values = {name: value for name, value in parsed.items() if value is not None}
    if "config" in values:
        file = Settings.from_values({"config": values["config"]}).config
        values = {**read_config(Path(file).expanduser()), **values}
    return Settings.from_values(values)


def read_config(path: Path) -> dict[str, Any]:
    """The YAML file's values by canonical name."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        _require_once(text, path)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"--config={path} cannot be read: {why}. Give a YAML file.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--config={path} cannot be read: {error}. Give a YAML file with plain values."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--config={path} is not YAML: {' '.join(str(error).split())}. Correct the file."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config={path} must hold lines of 'name: value', not a {type(content).__name__}."
        )
    return by_canonical_name(content, source=f"--config={path}")


def _require_once(text: str, path: Path) -> None:
    """ConfigError for a name that a YAML file has twice, of which PyYAML would take the last."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    names = [key.value for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"--config={path} has the name {name!r} twice. Leave one of them out."
            )


def by_canonical_name(content: Mapping[Any, Any], *, source: str) -> dict[str, Any]:
    """The same values under the names of Settings. ConfigError names `source` and the first unknown
    key.
    """
    names = canonical_names()
    values = {}
    for key, value in content.items():
        spelling = str(key).replace("-", "_")
        if spelling not in names:
            raise ConfigError(f"{source} has an unknown name {key!r}.{_closest(spelling)}")
        if values.setdefault(names[spelling], value) != value:
            raise ConfigError(
                f"{source} has {names[spelling]!r} twice, also by its other name {key!r}. Leave "
                "one of them out."
            )
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


class _Once(argparse.Action):
    """Stores a value. ConfigError for another one of the same argument: only one can count."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = self.const if values is None else values
        before = getattr(namespace, self.dest)
        if before not in (None, value):
            raise ConfigError(
                f"--{self.dest} was given twice, as {before[:80]} and as {value[:80]}. Give it "
                "once."
            )
        setattr(namespace, self.dest, value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            advice = (
                _closest(unknown[0].partition("=")[0].lstrip("-"))
                if unknown[0].startswith("-")
                else f" Give a model as --checkpoint={unknown[0]}."
            )
            raise ConfigError(f"{unknown[0]} is not an argument of this command.{advice}")
        return parsed


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launcher.py",
        allow_abbrev=False,
        usage="launcher.py [--type=TYPE] [--checkpoint=PATH] [ARGUMENT ...]",
        description="Serve one diffusion model on several GPUs over HTTP.",
        epilog="Example: python launcher.py --type=sdxl --port=6000. In names, '-' equals '_'.",
    )
    groups = {section: parser.add_argument_group(title) for section, title in SECTIONS.items()}
    for option in options().values():
        _add(groups[option.section], option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add the option under its name and, without help, under its other spellings."""
    text = option.text
    if option.default not in (None, False):
        text += f" Default: {'on' if option.default is True else option.default}."
    help_text = argparse.SUPPRESS if option.section == "old" else text.replace("%", "%%")
    for spelling in (option.name, *option.aliases):
        group.add_argument(
            f"--{spelling}",
            dest=option.name,
            action=_Once,
            default=None,
            help=help_text if spelling == option.name else argparse.SUPPRESS,
            nargs="?" if option.is_switch else None,
            const="true" if option.is_switch else None,
            metavar="BOOL" if option.is_switch else option.metavar,
        )
