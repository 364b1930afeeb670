"""LocalAI's model options -> the host that serves the model: one at an address, or one that is
started.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_client import PATIENCE_S, Client, HostError
from diffusion_client.local import LocalHost
from request_fields import require_available

CLIENT_OPTIONS = ("url", "api_key", "strength", "patience")
"""Options of this backend itself; every other one is an argument of the host to start."""
OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
LAUNCH_FIELDS = (
    "LowVRAM",
    "DType",
    "TensorParallelSize",
    "ControlNet",
    "LoraAdapter",
    "LoraAdapters",
)
"""Fields of which only a host that is started here takes note."""
VARIANTS = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
    "auto": None,
}
"""LocalAI's dtypes -> --variant. None: the host's default."""
DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """What one LoadModel asks for. identity: LocalAI's name of the model, by which a host with
    several may know it. url: of a host that runs, or None to start one with `arguments`.
    model_type: the only model that will do, if it is given. defaults: fields of each request.
    patience_s: how long a job waits for a host that restarts.
    """

    identity: str
    url: str | None
    api_key: str | None
    model_type: str
    arguments: tuple[str, ...]
    strength: float = DEFAULT_STRENGTH
    patience_s: float = PATIENCE_S
    defaults: dict[str, Any] = field(default_factory=dict)


def read_options(options: Any) -> ModelChoice:
    """options: ModelOptions of the protocol. HostError for what cannot be meant."""
    require_available(options)
    named = dict(_pair(text) for text in options.Options)
    defaults = {"guidance_scale": options.CFGScale or None, "clip_skip": options.CLIPSkip or None}
    url = named.get("url")
    if url:
        _require_none_of_launch(options, named)
        defaults["scheduler"] = options.SchedulerType or None
    return ModelChoice(
        identity=options.Model,
        url=url,
        api_key=named.get("api_key") or None,
        model_type=named.get("type") or options.PipelineType,
        arguments=() if url else _arguments(options, named),
        strength=_number(named, "strength", default=DEFAULT_STRENGTH, most=1),
        patience_s=_number(named, "patience", default=PATIENCE_S, most=86_400),
        defaults={name: value for name, value in defaults.items() if value is not None},
    )


class Model:
    """The host behind the backend; nothing until the first LoadModel."""

    def __init__(self) -> None:
        self.choice: ModelChoice | None = None
        self.client: Client | None = None
        self._started: LocalHost | None = None

    def load(self, choice: ModelChoice) -> None:
        """Be ready to draw with it. What is loaded already, and still there, is kept. HostError
        with the reason if it cannot be.
        """
        if choice == self.choice and self._is_there():
            return
        self.free()
        self._open(choice)
        self.choice = choice

    def require(self) -> tuple[ModelChoice, Client]:
        """What was loaded last. A host that was started here and has ended is started again; its
        choice is kept even if that fails, for the next request.
        """
        if self.choice is None:
            raise HostError("no model is loaded. Call LoadModel first.", status=412)
        if self._started is not None:
            with contextlib.suppress(HostError):  # it ended: started again below
                self._started.wait_until_ready()
        if not self._is_there():
            self._close()
            self._open(self.choice)
        return self.choice, self.client

    def free(self) -> None:
        """End the host, if it was started here."""
        self._close()
        self.choice = None

    def _open(self, choice: ModelChoice) -> None:
        if choice.url is not None:
            client = Client(choice.url, api_key=choice.api_key, patience_s=choice.patience_s)
            client.model = _model_of(client, choice)
        else:
            client = self._start(choice)
        self.client = client

    def _start(self, choice: ModelChoice) -> Client:
        self._started = LocalHost(*choice.arguments)
        try:
            self._started.wait_until_ready()
        except HostError:
            self._close()
            raise
        client = self._started.client
        client.patience_s = choice.patience_s
        return client

    def _close(self) -> None:
        if self._started is not None:
            self._started.stop()
        self.client = self._started = None

    def _is_there(self) -> bool:
        return self._started.is_running if self._started is not None else self.client is not None


def _model_of(client: Client, choice: ModelChoice) -> str | None:
    """The name of the model on a host that runs; None for its only one."""
    served = client.models()
    wanted = choice.model_type or (choice.identity if len(served) > 1 else "")
    if wanted and wanted not in served:
        raise HostError(
            f"the host at {choice.url} serves {', '.join(served)}, not {wanted}. Choose that, or "
            "another host.",
            status=400,
        )
    return wanted or None


def _require_none_of_launch(options: Any, named: dict[str, str | None]) -> None:
    """A host that runs already cannot be given other arguments."""
    given = [name for name in LAUNCH_FIELDS if getattr(options, name)]
    given += [name for name in named if name not in (*CLIENT_OPTIONS, "type")]
    if given:
        raise HostError(
            f"{given[0]} is for a host that this backend starts, but the option url names one that "
            f"runs. Leave out {given[0]}, or url.",
            status=400,
        )


def _arguments(options: Any, named: dict[str, str | None]) -> tuple[str, ...]:
    """Of the host. The model's own options win over what is derived from LocalAI's fields."""
    derived: dict[str, str | None] = {
        "type": options.PipelineType or None,
        "checkpoint": _checkpoint(options),
    }
    if options.SchedulerType:
        derived["scheduler"] = options.SchedulerType
    if options.F16Memory or options.DType:
        derived["variant"] = _variant(options)
    if options.TensorParallelSize:
        derived["nproc_per_node"] = str(options.TensorParallelSize)
    if loras := _loras(options):
        derived["lora"] = json.dumps(loras)
    if options.ControlNet:
        derived["control_net"] = _found(options.ControlNet, options.ModelPath)
    given = {name: value for name, value in derived.items() if value is not None}
    given |= {name: value for name, value in named.items() if name not in CLIENT_OPTIONS}
    offload = (
        ["--enable_model_cpu_offload"] if options.LowVRAM and not {*OFFLOADS} & {*given} else []
    )
    return (
        *(f"--{name}" if value is None else f"--{name}={value}" for name, value in given.items()),
        *offload,
    )


def _variant(options: Any) -> str | None:
    if not options.DType:
        return "fp16"
    if options.DType not in VARIANTS:
        raise HostError(
            f"DType={options.DType} is not allowed. Allowed: {', '.join(VARIANTS)}.", status=400
        )
    return VARIANTS[options.DType]


def _checkpoint(options: Any) -> str | None:
    """None, for the demo model, only where no model is named."""
    if not options.Model and not options.ModelFile:
        return None
    if options.ModelFile and os.path.exists(options.ModelFile):
        return options.ModelFile
    return _found(options.Model or options.ModelFile, options.ModelPath)


def _loras(options: Any) -> dict[str, float]:
    if len(options.LoraScales) > len(options.LoraAdapters):
        raise HostError(
            f"LoraScales has {len(options.LoraScales)} values for {len(options.LoraAdapters)} "
            "LoraAdapters. Give one for each.",
            status=400,
        )
    if options.LoraScale and not options.LoraAdapter:
        raise HostError("LoraScale is given without LoraAdapter. Give both.", status=400)
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
    """An absolute path, or one below LocalAI's folder of models."""
    path = Path(folder, name) if folder and not os.path.isabs(name) else Path(name)
    if not path.exists():
        raise HostError(
            f"{path} does not exist. Give a path below LocalAI's folder of models, or an absolute "
            "one.",
            status=400,
        )
    return str(path.resolve())


def _pair(text: str) -> tuple[str, str | None]:
    """'name:value', or a bare 'name'."""
    name, colon, value = text.partition(":")
    return name.strip().replace("-", "_"), value.strip() if colon else None


def _number(named: dict[str, str | None], name: str, *, default: float, most: float) -> float:
    if name not in named:
        return default
    with contextlib.suppress(TypeError, ValueError):
        if 0 <= (value := float(named[name])) <= most:
            return value
    raise HostError(
        f"{name}:{named[name] or ''} is not allowed. Give a number from 0 to {most:g}.", status=400
    )
