"""LoRA files on a loaded pipeline: any number at any scale, changed between generations without
touching the base weights.

diffusers converts and loads the file where the pipeline has a loader; elsewhere (HunyuanDiT,
PixArt, Stable Video Diffusion) peft is used directly. Scales are always set on peft's layers, so
that all model types behave alike.
"""

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backends.errors import ConfigError
from backends.loading.weights import Weights, read_weights
from backends.model_table import ModelSpec

logger = logging.getLogger(__name__)
logging.getLogger("diffusers.loaders").setLevel(
    logging.ERROR
)  # it warns of every text encoder that a LoRA does not touch
warnings.filterwarnings(
    "ignore", message="Already found a `peft_config`"
)  # several LoRAs at once are what this file is for

MAX_KEPT = 8
"""LoRAs of earlier requests that stay in memory; the longest unused goes first."""

_FACTOR = re.compile(
    r"^(?P<layer>.+)\.(?P<factor>lora_A|lora_B|lora_down|lora_up|lora_linear_layer\.down|lora_linear_layer\.up)\.weight$"
)
_DOWN = frozenset({"lora_A", "lora_down", "lora_linear_layer.down"})
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_")


class LoraSet:
    """The LoRAs of one pipeline. `use` decides which of them act."""

    def __init__(self, pipe: Any, spec: ModelSpec) -> None:
        self._pipe = pipe
        self._spec = spec
        self._names: dict[str, str] = {}  # path -> adapter name, the longest unused first
        self._active: dict[str, float] | None = {}
        self._num_loaded = 0
        self.is_fused = False

    def use(self, scales: Mapping[str, float]) -> None:
        """Let exactly these files act, at these scales; files that are not loaded yet are.
        ConfigError for one that does not fit.

        After `fuse` nothing changes any more.
        """
        if self.is_fused:
            return
        if scales.keys() - self._names.keys():
            self._active = (
                None  # a newly loaded LoRA acts at once, even if the next one does not load
            )
        for path in scales:
            name = self._names.pop(path, None) or self._load(path)
            self._names[path] = name
        self._forget({path for path in list(self._names)[:-MAX_KEPT] if path not in scales})
        active = {self._names[path]: scale for path, scale in scales.items()}
        if active == self._active:
            return
        for layer in self._layers():
            present = [name for name in active if name in layer.scaling]
            layer.enable_adapters(bool(present))
            if present:
                layer.set_adapter(present)
            for name in present:
                layer.set_scale(name, active[name])
        self._active = active

    def fuse(self) -> None:
        """Add what acts now to the base weights for good and leave plain layers behind: nothing of
        peft slows the model down.
        """
        for module in self._modules():
            for name, layer in [
                (name, layer)
                for name, layer in module.named_modules()
                if isinstance(layer, BaseTunerLayer)
            ]:
                if not layer.disable_adapters:
                    layer.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
            if hasattr(module, "peft_config"):
                del module.peft_config
                module._hf_peft_config_loaded = False
        self._names.clear()
        self.is_fused = True

    def _forget(self, paths: set[str]) -> None:
        for path in paths:
            name = self._names.pop(path)
            for layer in self._layers():
                layer.delete_adapter(name)

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
        """The name of a new adapter. Unique, because files may share a stem, and free of dots,
        which torch allows in no module's name.
        """
        self._num_loaded += 1
        name = f"lora_{self._num_loaded}"
        weights = read_weights(path, option="lora")
        try:
            if hasattr(self._pipe, "load_lora_weights"):
                require_fit(path, self._converted(weights), dict(self._pipe.components), self._spec)
                self._pipe.load_lora_weights(weights, adapter_name=name)
            else:
                self._inject(path, weights, name)
        except (
            ValueError,
            RuntimeError,
            KeyError,
            IndexError,
            AssertionError,
            TypeError,
        ) as error:  # however diffusers says no
            raise ConfigError(
                f"lora={path} does not fit {self._spec.title}: {error}. Give a LoRA made for this "
                "model type."
            ) from error
        logger.info("loaded LoRA %s", path)
        return name

    def _converted(self, weights: Weights) -> Weights:
        """diffusers' names, beginning with the component's."""
        arguments = {"unet_config": self._pipe.unet.config} if hasattr(self._pipe, "unet") else {}
        if "return_alphas" in inspect.signature(self._pipe.lora_state_dict).parameters:
            arguments["return_alphas"] = True
        result = self._pipe.lora_state_dict(dict(weights), **arguments)
        return result[0] if isinstance(result, tuple) else result

    def _inject(self, path: str, weights: Weights, name: str) -> None:
        """Put the LoRA into a denoiser for which diffusers has no loader."""
        denoiser = getattr(self._pipe, self._spec.denoiser)
        factors = factors_of(weights, denoiser)
        prefixed = {f"{self._spec.denoiser}.{key}": tensor for key, tensor in factors.items()}
        require_fit(path, prefixed, {self._spec.denoiser: denoiser}, self._spec)
        layers = sorted({key.rpartition(".lora_")[0] for key in factors})
        rank = factors[f"{layers[0]}.lora_A.weight"].shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False)
        inject_adapter_in_model(config, denoiser, adapter_name=name)
        set_peft_model_state_dict(denoiser, factors, adapter_name=name)


def factors_of(weights: Weights, denoiser: nn.Module) -> Weights:
    """Keys in any of the usual styles -> LAYER.lora_A.weight (rank, in) and LAYER.lora_B.weight
    (out, rank) with the alphas worked in.

    One rank for all: narrower factors get rows and columns of zeros, which change nothing.
    """
    flat_names = {name.replace(".", "_"): name for name, _ in denoiser.named_modules()}
    alphas = {
        _layer_name(key.removesuffix(".alpha"), flat_names): float(value)
        for key, value in weights.items()
        if key.endswith(".alpha")
    }
    found: dict[str, dict[bool, Tensor]] = {}
    for key, tensor in convert_unet_state_dict_to_peft(weights).items():
        if match := _FACTOR.match(key):
            found.setdefault(_layer_name(match["layer"], flat_names), {})[
                match["factor"] in _DOWN
            ] = tensor
    pairs = {layer: (pair[True], pair[False]) for layer, pair in found.items() if len(pair) == 2}
    rank = max((down.shape[0] for down, _ in pairs.values()), default=0)
    factors = {}
    for layer, (down, up) in pairs.items():
        factors[f"{layer}.lora_A.weight"] = _padded(down, 0, rank)
        factors[f"{layer}.lora_B.weight"] = _padded(
            up * (alphas.get(layer, down.shape[0]) / down.shape[0]), 1, rank
        )
    return factors


def _layer_name(name: str, flat_names: Mapping[str, str]) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return flat_names.get(name, name)


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim) if missing[dim] else tensor


def require_fit(
    path: str, weights: Weights, components: Mapping[str, Any], spec: ModelSpec
) -> None:
    """ConfigError unless every factor has a layer of its size. Keys begin with the component's
    name, layers follow.
    """
    shapes = {}
    for component, module in components.items():
        if isinstance(module, nn.Module):
            shapes |= {
                f"{component}.{_plain(name)}": _features(layer)
                for name, layer in module.named_modules()
            }
    keys, strangers = 0, []
    for key, tensor in convert_unet_state_dict_to_peft(
        {_text_layer(key): tensor for key, tensor in weights.items()}
    ).items():
        if match := _FACTOR.match(key):
            keys += 1
            component, _, layer = match["layer"].partition(".")
            features = shapes.get(f"{component}.{_plain(layer)}")
            is_down = match["factor"] in _DOWN
            if (
                features is None
                or tensor.shape[1 if is_down else 0] != features[0 if is_down else 1]
            ):
                strangers.append(key)
    if not keys and not any(".lokr_" in key for key in weights):
        raise ConfigError(
            f"lora={path} holds no LoRA weights. Give a file with lora_A and lora_B (or lora_down "
            "and lora_up) keys."
        )
    if strangers:
        raise ConfigError(
            f"lora={path} does not fit {spec.title}: {len(strangers)} of {keys} keys are for "
            "layers that the model does not have or has in "
            f"another size (the first: {strangers[0]}). Give a LoRA made for this model type."
        )


def _text_layer(key: str) -> str:
    """diffusers converts a text encoder's keys to names that its layers have only after a second
    conversion: the latter.
    """
    if not key.startswith("text_encoder"):
        return key
    return re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora_linear_layer.", key)


def _plain(name: str) -> str:
    """A layer's name without what peft and some versions of transformers put into it."""
    return name.replace("text_model.", "").removesuffix(".base_layer")


def _features(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that a LoRA can act on; asked of the layer, because packed weights have
    other shapes.
    """
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    for one, other in (("in_features", "out_features"), ("in_channels", "out_channels")):
        if isinstance(layer, nn.Linear | nn.Conv2d) and hasattr(layer, one):
            return getattr(layer, one), getattr(layer, other)
    return None
