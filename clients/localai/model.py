"""LocalAI's model options -> the host that serves the model: an existing one, or one that is
started.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_client import Client, HostError
from diffusion_client.local import LocalHost

CLIENT_OPTIONS = ("url", "api_key", "strength")
"""Options of this backend. All others are arguments of the host to start."""
DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """Contents of one LoadModel call."""

    url: str | None  # of a running host; None: start one with `arguments`
    api_key: str | None
    model_type: str
    arguments: tuple[str, ...]
    strength: float = DEFAULT_STRENGTH
    defaults: dict[str, Any] = field(default_factory=dict)  # fields of each request


def read_options(options: Any) -> ModelChoice:
    """Return the choice. HostError for invalid values. options: ModelOptions of the protocol."""
    named = dict(_pair(text) for text in options.Options)
    defaults = {"guidance_scale": options.CFGScale or None, "clip_skip": options.CLIPSkip or None}
    url = named.get("url")
    return ModelChoice(
        url=url,
        api_key=named.get("api_key") or None,
        model_type=named.get("type") or options.PipelineType,
        arguments=() if url else _arguments(options, named),
        strength=_strength(named.get("strength")),
        defaults={name: value for name, value in defaults.items() if value is not None},
    )


class Model:
    """The host behind the backend; none until the first LoadModel."""

    def __init__(self) -> None:
        self.choice: ModelChoice | None = None
        self.client: Client | None = None
        self._started: LocalHost | None = None

    def load(self, choice: ModelChoice) -> None:
        """Prepare to generate with this model. HostError with the reason if that fails.

        A model that is still loaded is kept.
        """
        if choice == self.choice and self._is_there():
            return
        self.free()
        if choice.url is not None:
            client = Client(choice.url, api_key=choice.api_key)
            _require_model(client, choice)
        else:
            self._started = LocalHost(*choice.arguments)
            try:
                self._started.wait_until_ready()
            except HostError:
                self.free()
                raise
            client = self._started.client
        self.choice, self.client = choice, client

    def free(self) -> None:
        """Stop the host if it was started here."""
        if self._started is not None:
            self._started.stop()
        self.choice = self.client = self._started = None

    def _is_there(self) -> bool:
        return self._started.is_running if self._started is not None else self.client is not None


def _require_model(client: Client, choice: ModelChoice) -> None:
    served = client.models()
    if choice.model_type and choice.model_type not in served:
        raise HostError(
            f"the host at {choice.url} serves {', '.join(served)}, not {choice.model_type}. Choose "
            "that, or another host.",
            status=0,
        )


def _arguments(options: Any, named: dict[str, str | None]) -> tuple[str, ...]:
    """Return the host's arguments.

    The model's own options override those derived from LocalAI's fields.
    """
    derived: dict[str, str | None] = {
        "type": options.PipelineType or None,
        "checkpoint": _checkpoint(options),
    }
    if options.SchedulerType:
        derived["scheduler"] = options.SchedulerType
    if options.F16Memory:
        derived["variant"] = "fp16"
    if loras := _loras(options):
        derived["lora"] = json.dumps(loras)
    if options.ControlNet:
        derived["control_net"] = _found(options.ControlNet, options.ModelPath)
    given = {name: value for name, value in derived.items() if value is not None}
    given |= {name: value for name, value in named.items() if name not in CLIENT_OPTIONS}
    return tuple(
        f"--{name}" if value is None else f"--{name}={value}" for name, value in given.items()
    )


def _checkpoint(options: Any) -> str | None:
    """Return the checkpoint. None, the demo model, only if no model is named."""
    if not options.Model and not options.ModelFile:
        return None
    if options.ModelFile and os.path.exists(options.ModelFile):
        return options.ModelFile
    return _found(options.Model or options.ModelFile, options.ModelPath)


def _loras(options: Any) -> dict[str, float]:
    scales: Sequence[float] = [
        *options.LoraScales,
        *[1.0] * (len(options.LoraAdapters) - len(options.LoraScales)),
    ]
    found = {
        _found(path, options.ModelPath): round(scale, 6)
        for path, scale in zip(options.LoraAdapters, scales, strict=False)
    }
    if options.LoraAdapter:
        found[_found(options.LoraAdapter, options.ModelPath)] = round(options.LoraScale, 6) or 1.0
    return found


def _found(name: str, folder: str) -> str:
    """Return an absolute path. A relative one is below LocalAI's model folder."""
    path = Path(folder, name) if folder and not os.path.isabs(name) else Path(name)
    if not path.exists():
        raise HostError(
            f"{path} does not exist. Give a path below LocalAI's folder of models, or an absolute "
            "one.",
            status=0,
        )
    return str(path.resolve())


def _pair(text: str) -> tuple[str, str | None]:
    """Split 'name:value'. A bare 'name' has no value."""
    name, colon, value = text.partition(":")
    return name.strip().replace("-", "_"), value.strip() if colon else None


def _strength(text: str | None) -> float:
    try:
        return DEFAULT_STRENGTH if text is None else float(text)
    except ValueError as error:
        raise HostError(
            f"strength:{text} is not a number. Give one from 0 to 1.", status=0
        ) from error
