"""The LoRA files of a loaded pipeline: any number, at any scale, without changing base weights.

A file's keys are grouped by layer (formats.py), its names looked up (names.py), and everything is
compared with the model. Only then does each change become a peft adapter of its layer (layers.py),
the same way for all model types. Embeddings become words of the prompt (embeddings.py).
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backends.errors import ConfigError
from backends.files.adapter_fit import foreign_architecture
from backends.loading.lora.embeddings import Embeddings, Words, split_embeddings
from backends.loading.lora.formats import (
    PARAMETERS,
    Parts,
    Update,
    family_of,
    kinds_of,
    missing_parts,
    scale_of,
    split_keys,
    update_of,
)
from backends.loading.lora.header import AdapterScales, read_metadata
from backends.loading.lora.layers import (
    ParameterDifferences,
    fits,
    install,
    merge,
    set_adapters,
    weight_size,
)
from backends.loading.lora.names import LayerNames, Place, denoisers_of, plain_layers
from backends.loading.model_files import read_weights
from backends.loading.quantization import POOLING
from backends.model_table import ModelSpec

logger = logging.getLogger(__name__)

MAX_KEPT = 8
"""LoRAs of earlier requests kept in memory; the least recently used is dropped first."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The changes of one file to a pipeline."""

    updates: dict[Place, Update] = field(default_factory=dict)
    parameters: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    words: Words = field(default_factory=dict)


class LoraSet:
    """The LoRAs of one pipeline. `use` selects the active ones."""

    def __init__(self, pipe: Any, spec: ModelSpec) -> None:
        self._pipe = pipe
        self._spec = spec
        self._names: dict[str, str] = {}  # path -> adapter name, the least recently used first
        self._active: dict[str, float] | None = {}
        self._num_loaded = 0
        self._differences = ParameterDifferences()
        self.embeddings = Embeddings(pipe)
        self.is_fused = False

    def use(self, scales: Mapping[str, float]) -> None:
        """Activate exactly these files at these scales, and load those that are new.

        ConfigError for a file that does not fit. No effect after `fuse`.
        """
        if self.is_fused:
            return
        if scales.keys() - self._names.keys():
            # a newly loaded LoRA is active at once, even if loading the next one fails
            self._active = None
        for path in scales:
            name = self._names.pop(path, None) or self._load(path)
            self._names[path] = name
        self._forget({path for path in list(self._names)[:-MAX_KEPT] if path not in scales})
        self._require_strengths(scales)
        active = {self._names[path]: scale for path, scale in scales.items() if scale}
        if active == self._active:
            return
        self._active = None
        for layer in self._layers():
            set_adapters(layer, active)
        self._differences.use(active)
        self.embeddings.use(list(active))
        self._active = active

    def _require_strengths(self, scales: Mapping[str, float]) -> None:
        for path, scale in scales.items():
            if scale not in (0, 1) and self._is_embedding(self._names[path]):
                raise ConfigError(
                    f"lora={path} has scale {scale:g}, but it is an embedding, which a word of the "
                    "prompt switches on. Give 1, or 0 to leave it out."
                )

    def _is_embedding(self, name: str) -> bool:
        """Return whether the file holds embeddings and nothing else."""
        return (
            self.embeddings.has(name)
            and not self._differences.has(name)
            and all(name not in layer.scaling for layer in self._layers())
        )

    def measure_again(self) -> None:
        """Make the next `use` set everything again. Call it after the base weights were moved."""
        self._active = None

    def has(self, paths: Iterable[str]) -> bool:
        """Return whether all these files are loaded."""
        return all(path in self._names for path in paths)

    def fuse(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Merge the active LoRAs into the base weights of these components for good, and remove
        peft's layers. None for all components.
        """
        for module in modules or self._modules():
            for name, layer in [
                (name, layer)
                for name, layer in module.named_modules()
                if isinstance(layer, BaseTunerLayer)
            ]:
                merge(layer)
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
            if hasattr(module, "peft_config"):
                del module.peft_config
        self._names.clear()
        self.is_fused = True

    def _forget(self, paths: set[str]) -> None:
        for path in paths:
            name = self._names.pop(path)
            for layer in self._layers():
                layer.delete_adapter(name)
            for module in self._modules():
                getattr(module, "peft_config", {}).pop(name, None)
            self._differences.forget(name)
            self.embeddings.forget(name)

    def _modules(self) -> Iterator[nn.Module]:
        return (
            module for module in self._pipe.components.values() if isinstance(module, nn.Module)
        )

    def _layers(self) -> Iterator[Any]:
        return (
            layer
            for module in self._modules()
            for layer in module.modules()
            if isinstance(layer, BaseTunerLayer)
        )

    def _load(self, path: str) -> str:
        """Load a file and return the name of its new adapter.

        Names are numbered, because files may share a stem and module names must not contain dots.
        """
        name = f"lora_{self._num_loaded + 1}"
        file = LoraFile(path)
        plan = file.plan(self._pipe, self._spec)
        if found := foreign_architecture(file.header, self._spec):
            logger.warning(
                "LoRA %s says that it was trained on another model (%s) than %s",
                path,
                found,
                self._spec.title,
            )
        self.embeddings.add(name, path, plan.words)
        self._num_loaded += 1
        for component in dict.fromkeys(place.component for place in plan.updates):
            self._inject(
                name,
                component,
                {
                    place.layer: update
                    for place, update in plan.updates.items()
                    if place.component == component
                },
            )
        self._differences.add(name, plan.parameters)
        logger.info(
            "loaded LoRA %s: %d layers, %d parameters, %d embeddings",
            path,
            *map(len, (plan.updates, plan.parameters, plan.words)),
        )
        return name

    def _inject(self, name: str, component: str, updates: Mapping[str, Update]) -> None:
        module = self._pipe.components[component]
        names = "|".join(re.escape(layer) for layer in updates)
        config = LoraConfig(
            r=1, lora_alpha=1, target_modules=f"(?:{names})", init_lora_weights=False
        )
        with warnings.catch_warnings():
            # several adapters at once are intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, module, adapter_name=name)
        dtype = next(
            (tensor.dtype for tensor in module.parameters() if tensor.dtype in FLOATS),
            torch.float32,
        )
        for layer, update in updates.items():
            install(
                module.get_submodule(layer),
                name,
                update,
                device=self._pipe._execution_device,
                dtype=dtype,
            )


class LoraFile:
    """One file: its keys and its header."""

    def __init__(self, path: str) -> None:
        self._path = path
        weights = read_weights(path, option="lora")
        if not isinstance(weights, Mapping):
            raise ConfigError(
                f"lora={path} holds no LoRA weights, but a {type(weights).__name__}. Give a file "
                "of tensors by name."
            )
        self.header = read_metadata(path)
        self._words, self._weights = split_embeddings(weights, Path(path).stem)
        self._scales = AdapterScales(path, self.header)
        self._require_finite()

    def _require_finite(self) -> None:
        embeddings = {
            f"{word}.{part}": vectors
            for word, parts in self._words.items()
            for part, vectors in parts.items()
        }
        for key, tensor in {**self._weights, **embeddings}.items():
            if (
                isinstance(tensor, Tensor)
                and tensor.is_floating_point()
                and not torch.isfinite(tensor.float()).all()
            ):
                raise ConfigError(
                    f"lora={self._path} holds weights that are not finite ({key}): every image "
                    "would be black. The training failed or the file is damaged: give another one."
                )

    def plan(self, pipe: Any, spec: ModelSpec) -> Plan:
        """Return the file's changes to this pipeline. ConfigError unless every key fits."""
        layers, strangers = split_keys(self._weights)
        if not layers and not self._words:
            raise ConfigError(
                f"lora={self._path} holds no LoRA weights{self._looks()}. {self._advice(spec)}"
            )
        if strangers:
            raise ConfigError(
                f"lora={self._path} holds {len(strangers)} keys that are not a LoRA's (the first: "
                f"{strangers[0]}){self._looks()}. Give a file of LoRA, LoCon, LoHa, LoKr, DoRA or "
                "an embedding."
            )
        self._require_whole(layers)
        return self._placed(layers, pipe, spec)

    def _require_whole(self, layers: Mapping[str, Parts]) -> None:
        halves = {
            layer: missing for layer, parts in layers.items() if (missing := missing_parts(parts))
        }
        if halves:
            layer, missing = next(iter(halves.items()))
            raise ConfigError(
                f"lora={self._path} is incomplete: {len(halves)} of {len(layers)} layers lack a "
                f"part (the first: {layer} has {', '.join(sorted(layers[layer]))}, but no "
                f"{' and no '.join(missing)}). Save or download the file again."
            )

    def _placed(self, layers: Mapping[str, Parts], pipe: Any, spec: ModelSpec) -> Plan:
        denoisers = denoisers_of(self._path, layers, spec.denoisers)
        if len(spec.denoisers) > 1:
            logger.info("LoRA %s is for %s", self._path, " and ".join(denoisers))
        names = LayerNames(pipe.components, denoisers)
        modules = {
            Place(component, name): getattr(layer, "base_layer", layer)
            if isinstance(layer, BaseTunerLayer)
            else layer
            for component in dict.fromkeys((spec.denoiser, *pipe.components))
            if isinstance(module := pipe.components[component], nn.Module)
            for name, layer in plain_layers(module)
        }
        plan, strangers = Plan(words=self._words), []
        for layer, parts in layers.items():
            found = [
                self._add(plan, layer, parts, places, modules) for places in names.places(layer)
            ]
            if not all(found):
                strangers.append(layer)
        if strangers:
            sizes = self._sizes(strangers[0], layers[strangers[0]], names, modules)
            num_keys = sum(len(layers[name]) for name in strangers)
            raise ConfigError(
                f"lora={self._path} does not fit {spec.title}: {num_keys} of {len(self._weights)} "
                "keys are for layers that the model does not have or has in another size (the "
                f"first: {self._first_key(strangers[0])}{sizes}){self._looks()}. Give a LoRA made "
                "for this model type."
            )
        return plan

    def _sizes(
        self,
        name: str,
        parts: Parts,
        names: LayerNames,
        modules: Mapping[Place, nn.Module],
    ) -> str:
        """Return the sizes of a layer in the file and in the model where they differ."""
        for places in filter(None, names.places(name)):
            layers = [modules[Place(place.component, place.layer)] for place in places]
            wanted = [size for layer in layers if (size := weight_size(layer)) is not None]
            with contextlib.suppress(RuntimeError, ValueError, IndexError):
                update = update_of(parts, 1.0)
                own = (sum(rows for rows, _ in wanted), wanted[0][1])
                if update is not None and update.shape != own:
                    return f": {update.shape[0]}x{update.shape[1]}, in the model {own[0]}x{own[1]}"
        return ""

    def _add(
        self,
        plan: Plan,
        name: str,
        parts: Parts,
        places: Sequence[Place],
        modules: Mapping[Place, nn.Module],
    ) -> bool:
        """Add one layer of the file to the plan. Return whether all of it fits the model."""
        if not places:
            return False
        found = [modules[Place(place.component, place.layer)] for place in places]
        try:
            scale = scale_of(parts, lambda rank: self._scales.scale(places[0], name, rank))
            update = update_of(parts, scale)
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
            return False  # factors whose shapes do not match
        if update is not None and not self._add_update(plan, update, places, found):
            return False
        return all(
            self._add_parameter(
                plan,
                parts[role].float() * (scale if role == "up_bias" else 1),
                attribute,
                places,
                found,
            )
            for role, attribute in PARAMETERS.items()
            if role in parts and not (role == "diff" and update is not None)
        )

    def _add_update(
        self, plan: Plan, update: Update, places: Sequence[Place], found: Sequence[nn.Module]
    ) -> bool:
        pieces = _pieces(update.shape[0], found)
        if pieces is None or (update.by_column and len(found) > 1):
            return False
        for place, layer, rows in zip(places, found, pieces, strict=True):
            is_whole = len(found) == 1 and not place.is_swapped
            piece = (
                update if is_whole else update.rows(_swapped(rows) if place.is_swapped else rows)
            )
            key = Place(place.component, place.layer)
            if key in plan.updates:
                raise self._twice(key)
            if not fits(piece, layer):
                return False
            if key.layer.startswith(POOLING):
                return (
                    self._add_parameter(plan, piece.dense(), "weight", [key], [layer])
                    and piece.magnitude is None
                )
            plan.updates[key] = piece
        return True

    def _add_parameter(
        self,
        plan: Plan,
        change: Tensor,
        attribute: str,
        places: Sequence[Place],
        found: Sequence[nn.Module],
    ) -> bool:
        parameters = [getattr(layer, attribute, None) for layer in found]
        if not all(
            isinstance(parameter, nn.Parameter) and not parameter.is_meta
            for parameter in parameters
        ):
            return False
        if sum(parameter.numel() for parameter in parameters) != change.numel():
            return False
        pieces = change.flatten().split([parameter.numel() for parameter in parameters])
        for place, layer, piece in zip(places, found, pieces, strict=True):
            if (layer, attribute) in plan.parameters:
                raise self._twice(place)
            plan.parameters[layer, attribute] = (
                torch.cat(piece.chunk(2)[::-1]) if place.is_swapped else piece
            )
        return True

    def _twice(self, place: Place) -> ConfigError:
        return ConfigError(
            f"lora={self._path} changes the layer {place.layer} of the {place.component} twice, "
            "under different names. Remove one of them from the file."
        )

    def _first_key(self, layer: str) -> str:
        return next(
            (key for key in self._weights if key.startswith((f"{layer}.", f"{layer}_lora"))), layer
        )

    def _looks(self) -> str:
        """Return what the file seems to be, for error messages."""
        kinds, family = kinds_of(self._weights), family_of(self._weights, self.header)
        says = [f"it holds {', '.join(kinds)}"] if kinds else []
        says += [f"it seems to be made for {family[:60]}"] if family else []
        return f"; {' and '.join(says)}" if says else ""

    def _advice(self, spec: ModelSpec) -> str:
        kinds = kinds_of(self._weights)
        options = {
            "a checkpoint": "--checkpoint",
            "a ControlNet": "--control_net",
            "an IP-Adapter": "--ip_adapter",
            "a VAE": "--vae",
        }
        option = next((options[kind] for kind in kinds if kind in options), None)
        if option:
            return f"Give it as {option}, or a LoRA made for {spec.title} here."
        return (
            "Give a file with lora_A and lora_B (or lora_down and lora_up) keys, with LoHa, "
            "LoKr or DoRA, or an embedding."
        )


def _pieces(num_rows: int, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """Split the rows of a fused weight among its layers. None if the sizes do not add up."""
    sizes = [
        getattr(layer, "out_features", None) or getattr(layer, "out_channels", 0)
        for layer in layers
    ]
    return list(torch.arange(num_rows).split(sizes)) if sum(sizes) == num_rows else None


def _swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])
