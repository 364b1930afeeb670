"""How one launch argument is declared, and the parsers of the host's own values: text -> value. A
parser's ValueError says what is allowed. hosts/launch/settings.py is the table of all arguments,
backends/options.py has the parsers that the backends' options need too. Imports no torch.
"""

import ast
import difflib
import importlib.util
import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backends import BACKEND_NAMES, plan_module
from backends.errors import ConfigError
from backends.options import Option as BackendOption
from backends.options import one_of, parse_switch

SECTIONS = {
    "common": "The ten that people use first",
    "proxies": "Clients and proxies",
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

COMPILE_MODES = (
    "default",
    "lite",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)
COMPILE_BACKENDS = (
    "inductor",
    "eager",
    "aot_eager",
    "aot_eager_decomp_partition",
    "cudagraphs",
    "openxla",
    "tvm",
)
"""Those that torch brings, without those for its own tests. Packages may bring more."""
MIN_KEY = 16
MAX_SCALE = 1e6
KEY_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.ASCII)
ORIGIN = re.compile(
    r"https?://([a-z0-9]([a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\])(:\d{1,5})?", re.ASCII
)


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


def secret(text: str) -> str:
    """Return the key, or read it from @FILE: process listings do not show a file."""
    allowed = f"a key of at least {MIN_KEY} characters, or @FILE with one in its first line"
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{allowed} (the file cannot be read)") from error
        text = lines[0].strip() if lines else ""
    if len(text) < MIN_KEY or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{allowed}, printable ASCII without spaces")
    return text


def path(text: str) -> str:
    """Return the text, which can be the path of a file or folder."""
    try:
        Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the path of a file or folder ({error})") from error
    if not text.strip() or "\0" in text:
        raise ValueError("the path of a file or folder; leave the argument out for none")
    return text


def folder(text: str) -> str:
    """Return the path of a folder, or of one that can be created."""
    if Path(path(text)).expanduser().exists() and not Path(text).expanduser().is_dir():
        raise ValueError("a folder, or a path where one can be created")
    return text


def folders(text: str) -> str:
    """'/models/loras:/more': folders that exist."""
    for each in text.split(":"):
        if not Path(path(each)).expanduser().is_dir():
            raise ValueError(f"folders that exist, separated by ':' ({each} is not one)")
    return text


def keys_file(text: str) -> str:
    """Return the path of a file with keys, which can be read."""
    file = Path(path(text)).expanduser().absolute()
    read_keys(file)
    return str(file)


def read_keys(file: Path) -> dict[str, str]:
    """Return name -> key of a file with lines 'NAME KEY'; those that begin with '#' do not count.
    ValueError says which line is wrong, and never shows a key.
    """
    allowed = "a file with a line 'NAME KEY' for each client"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{allowed} (it cannot be read)") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not KEY_NAME.fullmatch(words[0]) or words[1].startswith("@"):
            raise ValueError(
                f"{allowed} (line {number} is not of this form); names have letters, digits "
                "and ._- only, at most 64"
            )
        try:
            key = secret(words[1])
        except ValueError as error:
            raise ValueError(f"{allowed} (line {number}: {error})") from error
        if words[0] in found or key in found.values():
            raise ValueError(f"{allowed} (line {number} repeats a name or a key)")
        found[words[0]] = key
    if not found:
        raise ValueError(f"{allowed} (it has no such line)")
    return found


def endpoint(text: str) -> str:
    """'10.0.0.1:29500' or '[fd00::1]:29500', as it is."""
    split_endpoint(text)
    return text


def split_endpoint(text: str) -> tuple[str, int]:
    """Host and port of an `endpoint`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("HOST:PORT, the address of the first machine and a free port there")
    return host, int(port)


def public_url(text: str) -> str:
    """'https://draw.example/gpu/' without the final slash."""
    allowed = "a URL without query, such as https://draw.example or https://draw.example/gpu"
    try:
        parts = urlsplit(text)
        has_name = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise ValueError(allowed) from error
    is_plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not has_name or not is_plain:
        raise ValueError(allowed)
    if not re.fullmatch(r"(/[\w.~-]+)*/?", parts.path, re.ASCII):
        raise ValueError(f"{allowed}; its path has letters, digits and -._~ only")
    return text.rstrip("/")


def host_names(text: str) -> tuple[str, ...]:
    """'draw.example,10.0.0.7': names or addresses, without ports."""
    names = tuple(name.lower().removesuffix(".") for name in items(text))
    for name in names:
        if not HOST_NAME.fullmatch(name) and not _is_address(name):
            raise ValueError(f"names or addresses such as draw.example, without port, not {name!r}")
    return names


def origins(text: str) -> tuple[str, ...]:
    """'http://localhost:5001,https://chat.example': scheme, name and port, as browsers send it."""
    found = tuple(origin.lower().removesuffix("/") for origin in items(text))
    for origin in found:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(f"origins such as http://localhost:5001, not {origin!r}")
    return found


def networks(text: str) -> tuple[str, ...]:
    """'127.0.0.1,10.0.0.0/8': addresses or networks."""
    for item in items(text):
        try:
            ipaddress.ip_network(item)
        except ValueError as error:
            raise ValueError(
                f"addresses or networks such as 127.0.0.1,10.0.0.0/8 ({error})"
            ) from error
    return items(text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def paths(text: str) -> tuple[str, ...]:
    """'a.pth,b.pth', or a JSON list: paths of files or folders."""
    return tuple(path(each) for each in items(text))


def items(text: str) -> tuple[str, ...]:
    """The items of a comma-separated text or of a JSON list. ValueError if there are none."""
    value = _json_or_text(text)
    items = value if isinstance(value, list) else str(value).split(",")
    found = tuple(str(item).strip() for item in items if str(item).strip())
    if not found:
        raise ValueError("at least one, separated by commas")
    return found


def scales(text: str) -> dict[str, float]:
    """JSON {"path": scale}, a JSON string, or a bare path (scale 1)."""
    value = _json_or_text(text)
    if isinstance(value, str):
        return {path(value): 1.0}
    if not isinstance(value, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()
    ):
        raise ValueError('JSON such as {"path/to/file.safetensors": 0.8}')
    for file, scale in value.items():
        if not abs(scale) < MAX_SCALE:  # also NaN
            raise ValueError(f"scales below {MAX_SCALE:g}, and {file} has scale {scale}")
    return {path(file): float(scale) for file, scale in value.items()}


def scheduler(text: str) -> dict[str, Any]:
    """JSON {"scheduler": name, ...}, or a bare name."""
    value = _json_or_text(text)
    if isinstance(value, str):
        return {"scheduler": value}
    if not isinstance(value, dict):
        raise ValueError(
            'a name such as euler, or JSON such as {"scheduler": "euler", "timestep_spacing": '
            '"trailing"}'
        )
    return value


def compile_backend(text: str) -> str:
    """Return the name of a backend of torch.compile that is there, without importing torch."""
    more = (point.name for point in entry_points(group="torch_dynamo_backends"))
    return one_of(*COMPILE_BACKENDS, *more)(text)


def require_inductor_options(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first option that inductor lacks, without importing torch."""
    known = _inductor_settings()
    for name in (each.replace("-", "_") for each in given) if known else ():
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=3)
            advice = f" (closest: {', '.join(closest)})" if closest else ""
            raise ConfigError(
                f"--compile_options={json.dumps(given)} is not allowed. Allowed: settings of "
                f"torch._inductor.config, and {name} is not one{advice}. Correct it, or leave "
                "it out."
            )


@lru_cache(maxsize=1)
def _inductor_settings() -> frozenset[str]:
    """Return the names in the source of torch._inductor.config; none if torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return frozenset()
    config = ast.parse((Path(spec.origin).parent / "_inductor" / "config.py").read_text("utf-8"))
    groups = {node.name: node for node in config.body if isinstance(node, ast.ClassDef)}
    bases = {
        name: [ast.unparse(base) for base in node.bases if ast.unparse(base) in groups]
        for name, node in groups.items()
    }
    return frozenset(_assigned(config.body)) | {
        f"{name}.{key}"
        for name in groups
        for origin in (name, *bases[name])
        for key in _assigned(groups[origin].body)
    }


def _assigned(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If):
            yield from _assigned([*node.body, *node.orelse])
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def json_object(text: str) -> dict[str, Any]:
    value = _json_or_text(text)
    if not isinstance(value, dict):
        raise ValueError('JSON such as {"triton.cudagraphs": true}')
    return value


def _json_or_text(text: str) -> Any:
    """JSON where the text looks like JSON (starts with a brace, bracket or quote), else the text
    itself.
    """
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"valid JSON ({error.msg} at character {error.pos})") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise ValueError("valid JSON, without thousands of digits or brackets") from error
