"""A1111's prompt language: LoRA tags become the field `lora`, emphasis asks for `prompt_syntax`."""

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.errors import RequestError, UnsupportedError
from backends.generation.text.emphasis import has_composition, has_emphasis
from backends.model_table import ModelSpec
from hosts.http.decode import Accepted
from hosts.http.dialect import is_empty, is_strict, shown

TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]*)((?::[^:<>]*)*)>", re.IGNORECASE)
NOTE = (
    "the prompt has A1111's emphasis or composition (such as (word:1.2), [word], BREAK, AND), "
    "which is read as plain text here"
)
MAX_SHORT = 225
"""Bytes of a text that surely has no more than CLIP's 75 tokens."""
MAX_HEADER = 100 * 2**20
MAX_NAMES = 20
ENDING = ".safetensors"
LISTED = {"path", "multiplier"}
"""The fields of a LoRA in a list."""


@dataclass(slots=True, kw_only=True)
class Prompt:
    """A prompt without its tags."""

    text: str
    """The remaining text."""
    loras: dict[str, Any] = field(default_factory=dict)
    """File -> weight."""
    fields: dict[str, Any] = field(default_factory=dict)
    """`prompt_syntax`, where the model would read the text differently without it."""
    notes: list[str] = field(default_factory=list)
    """What is read differently from A1111."""


def read_prompt(body: Mapping[str, Any], *, spec: ModelSpec, accepted: Accepted) -> Prompt:
    """Return the prompt of a request, with the LoRAs of its tags and of its field `lora`."""
    given = body.get("lora")
    loras = dict(given) if isinstance(given, Mapping) else _listed(given)
    text, negative = body.get("prompt"), body.get("negative_prompt")
    if not is_empty(given) and not loras:
        raise RequestError(
            f'lora={shown(given)} is not allowed. Send {{"file": weight}}.', field="lora"
        )
    if isinstance(negative, str) and TAG.search(negative):
        raise RequestError(
            "negative_prompt has a LoRA tag, which acts in prompt only. Put it there.",
            field="negative_prompt",
        )
    if not isinstance(text, str):
        return Prompt(text=text or "", loras=loras)  # refused where requests are read
    is_off = str(body.get("disable_extra_networks")).lower() in ("true", "1")
    for match in () if is_off else TAG.finditer(text):
        loras[_file(match[1], match[2], accepted.lora_dirs)] = _weight(match[0], match[3])
    rest = re.sub(r" {2,}", " ", TAG.sub("", text)).strip() if TAG.search(text) else text
    texts = [each for each in (rest, negative) if isinstance(each, str)]
    has_weights = any(map(has_emphasis, texts))
    is_plain = not is_strict(body) and any(map(has_composition, texts))
    if not spec.has_clip_prompts or is_plain:
        return Prompt(text=rest, loras=loras, notes=[NOTE] if has_weights else [])
    is_long = any(len(each.encode("utf-8", "replace")) > MAX_SHORT for each in texts)
    is_weighed = has_weights or is_long or accepted.launch.compel
    fields = {"prompt_syntax": "a1111"} if is_weighed else {}
    return Prompt(text=rest, loras=loras, fields=fields)


def _listed(given: Any) -> dict[str, Any]:
    """Return the LoRAs of a list, as stable-diffusion.cpp's server takes them; {} if it is none."""
    items = given if isinstance(given, list) else []
    if not all(isinstance(item, Mapping) and item.keys() <= LISTED for item in items):
        return {}
    return {str(item.get("path")): item.get("multiplier", 1.0) for item in items}


def lora_files(folders: Sequence[str]) -> list[tuple[Path, str]]:
    """Return the files that requests may use, each with its path relative to its folder."""
    return [
        (path, str(path.relative_to(folder)))
        for folder in folders
        for path in sorted(Path(folder).rglob(f"*{ENDING}"))
    ]


def alias_of(path: Path) -> str:
    """Return the name under which the file was trained, or else the file's own."""
    return _trained_name(path) or path.stem


def _file(kind: str, name: str, folders: Sequence[str]) -> str:
    """Return the path, relative to its folder, of the file that a tag names."""
    if kind.lower() == "hypernet":
        raise UnsupportedError(
            f"prompt: hypernet:{shown(name)} is not available. Leave the tag out.", field="prompt"
        )
    files = lora_files(folders)
    wanted = name.strip().removesuffix(ENDING)
    for names in (_paths(files), _stems(files), _trained(files)):
        for known, inside in names:
            if known == wanted:
                return inside
    listed = ", ".join(path.stem for path, _ in files[:MAX_NAMES]) or "none (--lora_dir)"
    raise RequestError(
        f"prompt names the LoRA {shown(name)}, which does not exist here. Allowed: {listed}.",
        field="prompt",
    )


def _paths(files: Sequence[tuple[Path, str]]) -> Iterator[tuple[str, str]]:
    return ((inside.removesuffix(ENDING), inside) for _, inside in files)


def _stems(files: Sequence[tuple[Path, str]]) -> Iterator[tuple[str, str]]:
    return ((path.stem, inside) for path, inside in files)


def _trained(files: Sequence[tuple[Path, str]]) -> Iterator[tuple[str, str]]:
    return ((_trained_name(path), inside) for path, inside in files)


def _trained_name(path: Path) -> str:
    """Return ss_output_name from the file's header; empty if it has none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= MAX_HEADER else {}
        return str(header.get("__metadata__", {}).get("ss_output_name") or "")
    except (OSError, ValueError, struct.error, AttributeError, RecursionError):
        return ""


def _weight(tag: str, text: str) -> float:
    """Return the weight of '<lora:name:0.8>'; 1 without one.

    If the tag has several weights, they must be equal.
    """
    parts = [part.partition("=")[2] or part for part in text.split(":")[1:] if part.strip()]
    try:
        weights = {float(part) for part in parts} or {1.0}
    except ValueError as error:
        raise RequestError(
            f"prompt has the tag {shown(tag)}, whose weight is not a number. Send <lora:name:1>.",
            field="prompt",
        ) from error
    if len(weights) > 1:
        raise UnsupportedError(
            f"prompt has the tag {shown(tag)}, but only one weight for all parts of the model is "
            "available. Send one.",
            field="prompt",
        )
    return weights.pop()
