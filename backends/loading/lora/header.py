"""What a LoRA file says about itself: its metadata, and the scales of its layers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open

from backends.errors import ConfigError
from backends.loading.lora.names import Place


class AdapterScales:
    """alpha / rank from a peft configuration, in the file's header or beside it.

    For files without an alpha per layer.
    """

    def __init__(self, path: str, header: Mapping[str, str]) -> None:
        self._settings: dict[str, Any] = _json(path, header.get("lora_adapter_metadata") or "{}")
        beside = Path(path).with_name("adapter_config.json")
        if Path(path).stem == "adapter_model" and beside.is_file():
            self._settings |= _json(path, beside.read_text(encoding="utf-8"))

    def scale(self, place: Place, name: str, rank: int) -> float:
        """Return alpha / rank of a layer. name: the layer's in the file, for patterns."""
        alpha = self._setting(place.component, "lora_alpha")
        patterns = self._setting(place.component, "alpha_pattern") or {}
        for layer in (place.layer, name):
            if (key := get_pattern_key(patterns, layer)) in patterns:
                alpha = patterns[key]
                break
        if alpha is None:
            return 1.0
        return float(alpha) / (
            math.sqrt(rank) if self._setting(place.component, "use_rslora") else rank
        )

    def _setting(self, component: str, name: str) -> Any:
        """Return a setting. diffusers prefixes the component; peft's files have one."""
        return self._settings.get(f"{component}.{name}", self._settings.get(name))


def _json(path: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"lora={path} has a configuration (lora_adapter_metadata) that is not JSON: {error}. "
            "Save the file again."
        ) from error
    return content if isinstance(content, dict) else {}


def read_metadata(path: str) -> dict[str, str]:
    """Return the metadata of a safetensors file; none of another."""
    if Path(path).suffix not in (".safetensors", ".sft"):
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
