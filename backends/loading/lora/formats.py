"""LoRA file formats: which keys belong to one layer, and how they change its weight.

LoRA and LoCon store a product of two factors, LoHa (LyCORIS) the elementwise product of two such
products, LoKr a Kronecker product, and some files the full difference. DoRA adds a magnitude for
each row (in files of old LyCORIS: each column) of the weight. Knows nothing about models: `names`
maps a name to a layer.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""One layer's tensors in a file: role -> tensor."""

_ADAPTER = r"(?:\.[^.]+)?"
_ROLES: Mapping[str, str] = {
    "down": rf"(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down){_ADAPTER}\.weight",
    "up": rf"(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up){_ADAPTER}\.weight",
    "up_bias": rf"(?:lora_B|lora_up){_ADAPTER}\.bias",
    "mid": r"lora_mid\.weight",
    "alpha": r"alpha",
    "dora_scale": r"dora_scale",
    "magnitude": rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?",
    "diff": r"diff|w_norm",
    "diff_b": r"diff_b|b_norm",
    "diff_m": r"diff_m",
    **{
        name: name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },
    **{
        name: name
        for name in (
            "lokr_w1",
            "lokr_w1_a",
            "lokr_w1_b",
            "lokr_w2",
            "lokr_w2_a",
            "lokr_w2_b",
            "lokr_t2",
        )
    },
}
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:"
    + "|".join(f"(?P<{role}>{pattern})" for role, pattern in _ROLES.items())
    + ")"
)
_OLD_KEY = re.compile(r"(?P<layer>.+)_lora(?P<number>\d*)\.(?P<role>down|up)\.weight")
"""diffusers' first layout, and XLabs' for FLUX: its number is 1 for image and 2 for text layers."""

PARAMETERS: Mapping[str, str] = {
    "diff": "weight",
    "diff_b": "bias",
    "up_bias": "bias",
    "diff_m": "scale_shift_table",
}
"""Roles that change a parameter of a module directly -> the parameter."""

_MARKS: Mapping[str, str] = {
    "LoHa": ".hada_",
    "LoKr": ".lokr_",
    "DoRA": ".dora_scale",
    "DoRA of peft": ".lora_magnitude_vector",
    "OFT": ".oft_",
    "GLoRA": ".a1.weight",
    "IA3": ".on_input",
    "a textual inversion": "emb_params",
    "a ControlNet": "control",
    "an IP-Adapter": "ip_adapter",
    "a checkpoint": "model.diffusion_model.",
    "a VAE": "decoder.up",
}
_FAMILIES: Mapping[str, str] = {
    "Stable Diffusion XL": r"lora_te2_|input_blocks_|text_encoder_2\..*self_attn",
    "AnimateDiff": r"motion_modules",
    "FLUX": r"double_blocks[._]|single_transformer_blocks[._]",
    "Stable Diffusion 3": r"joint_blocks[._]",
    "Qwen-Image": r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)",
    "Wan": r"blocks[._]\d+[._](?:self_attn|cross_attn)[._][qkvo][._]|condition_embedder[._]",
    "Z-Image": r"layers[._]\d+[._](?:attention|feed_forward)[._]",
    "HunyuanVideo": r"img_attn_qkv|txt_attn_qkv",
    "Stable Diffusion": r"down_blocks[._]|mid_block[._]",
    "HunyuanDiT or Wan": r"blocks[._]\d+[._]attn[12]",
    "PixArt, FLUX or Stable Diffusion 3": r"transformer_blocks[._]\d+[._]attn",
}
_HEADER_KEYS = ("modelspec.architecture", "ss_base_model_version", "baseModel", "base_model")


@dataclass(frozen=True, kw_only=True)
class Update:
    """The change of a layer's weight (out, in, ...): up @ down, kron(left, down) or down."""

    down: Tensor  # matrix; a convolution's kernel is flattened into its columns
    up: Tensor | None = None  # matrix
    left: Tensor | None = None  # matrix
    magnitude: Tensor | None = None  # DoRA's, one per row, or per column with `by_column`
    by_column: bool = False
    # Whether the scale acts inside DoRA's norm, as in peft, or on the whole change, as in A1111
    # and ComfyUI.
    scales_norm: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in * kernel size) of the weight that it changes."""
        if self.left is not None:
            return self.left.shape[0] * self.down.shape[0], self.left.shape[1] * self.down.shape[1]
        return (self.down if self.up is None else self.up).shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """Return the change without DoRA, as a matrix."""
        if self.left is not None:
            return torch.kron(self.left, self.down)
        return self.down if self.up is None else self.up @ self.down

    def rows(self, index: Tensor) -> "Update":
        """Return the change of these rows of the weight."""
        magnitude = (
            self.magnitude[index]
            if self.magnitude is not None and not self.by_column
            else self.magnitude
        )
        if self.up is None:
            return replace(self, down=self.dense()[index], left=None, magnitude=magnitude)
        return replace(self, up=self.up[index], magnitude=magnitude)


def split_keys(keys: Mapping[str, Tensor]) -> tuple[dict[str, Parts], list[str]]:
    """Return (layer's name in the file -> its parts, keys that are not a LoRA's)."""
    layers: dict[str, Parts] = {}
    strangers = []
    for key, tensor in keys.items():
        layer, role = _role_of(key)
        if role is None or role in layers.get(layer, {}) or not isinstance(tensor, Tensor):
            strangers.append(key)
        else:
            layers.setdefault(layer, {})[role] = tensor
    return layers, strangers


def _role_of(key: str) -> tuple[str, str | None]:
    if match := _KEY.fullmatch(key):
        return match["layer"], match.lastgroup
    if match := _OLD_KEY.fullmatch(key):
        return match["layer"] + match["number"], match["role"]
    return key, None


def missing_parts(parts: Parts) -> list[str]:
    """Return the roles that a layer with these parts lacks."""
    roles = parts.keys()
    if roles & {"down", "up", "mid"}:
        needed = ["down", "up"]
    elif any(role.startswith("hada_") for role in roles):
        needed = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
    elif any(role.startswith("lokr_") for role in roles):
        needed = [role for number in "12" for role in _factor_roles(roles, f"lokr_w{number}")]
    else:
        needed = [] if roles & PARAMETERS.keys() else ["down", "up"]
    return [role for role in needed if role not in roles]


def _factor_roles(roles: Iterable[str], name: str) -> list[str]:
    return (
        [name]
        if name in roles or not {f"{name}_a", f"{name}_b"} & set(roles)
        else [f"{name}_a", f"{name}_b"]
    )


def scale_of(parts: Parts, from_header: Callable[[int], float]) -> float:
    """Return alpha / rank. from_header: rank -> scale, for files without an alpha per layer.

    A LoKr of two whole factors has no rank, and its alpha means nothing.
    """
    rank = next(
        (
            parts[role].shape[0]
            for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
            if role in parts
        ),
        None,
    )
    if rank is None:
        return 1.0
    return float(parts["alpha"]) / rank if "alpha" in parts else from_header(rank)


def update_of(parts: Parts, scale: float) -> Update | None:
    """Return the change at this scale; None if the parts change only single parameters."""
    parts = {role: tensor.float() for role, tensor in parts.items()}
    update = _change(parts, scale)
    return None if update is None else replace(update, **_decomposition(parts, update))


def _change(parts: Parts, scale: float) -> Update | None:
    if "down" in parts:
        return Update(down=_down(parts), up=parts["up"].flatten(1) * scale)
    if "hada_w1_a" in parts:
        return _hadamard(parts, scale)
    if any(role.startswith("lokr_") for role in parts):
        return Update(
            left=_kronecker_factor(parts, "lokr_w1") * scale,
            down=_kronecker_factor(parts, "lokr_w2"),
        )
    if "diff" in parts and parts["diff"].dim() > 1:
        return Update(down=parts["diff"].flatten(1))
    return None


def _down(parts: Parts) -> Tensor:
    """Return (rank, in * kernel size). A LoCon in CP form keeps its kernel between the factors."""
    down = parts["down"].flatten(1)
    if "mid" not in parts:
        return down
    return torch.einsum("r s ..., s i -> r i ...", parts["mid"], down).flatten(1)


def _hadamard(parts: Parts, scale: float) -> Update:
    """Return (w1_a @ w1_b) * (w2_a @ w2_b), as factors of rank r * r if that is smaller."""
    if "hada_t1" in parts:
        one, other = (
            _tucker(parts[f"hada_t{n}"], parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in "12"
        )
        return Update(down=(one * other).flatten(1) * scale)
    a1, b1, a2, b2 = (parts[f"hada_w{n}"].flatten(1) for n in ("1_a", "1_b", "2_a", "2_b"))
    if b1.shape[0] * b2.shape[0] < min(a1.shape[0], b1.shape[1]):
        up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
        return Update(down=(b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1), up=up * scale)
    return Update(down=(a1 @ b1) * (a2 @ b2) * scale)


def _kronecker_factor(parts: Parts, name: str) -> Tensor:
    if name in parts:
        return parts[name].flatten(1)
    one, other = parts[f"{name}_a"], parts[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in parts:
        return _tucker(parts["lokr_t2"], one, other).flatten(1)
    return one @ other.flatten(1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Contract core (i, j, ...), a (i, out) and b (j, in) to (out, in, ...)."""
    return torch.einsum("i j ..., j r, i p -> p r ...", core, b, a)


def _decomposition(parts: Parts, update: Update) -> dict[str, object]:
    """Return DoRA's fields. peft's magnitude is per row; LyCORIS' per row or column."""
    if "magnitude" in parts:
        return {"magnitude": parts["magnitude"].flatten(), "scales_norm": True}
    if "dora_scale" in parts:
        magnitude = parts["dora_scale"]
        return {
            "magnitude": magnitude.flatten(),
            "by_column": magnitude.dim() > 1 and magnitude.shape[0] != update.shape[0],
        }
    return {}


def kinds_of(keys: Iterable[str]) -> list[str]:
    """Return what the keys look like: LoHa, DoRA, a checkpoint, ..."""
    text = "\n".join(keys)
    return [kind for kind, mark in _MARKS.items() if mark in text]


def family_of(keys: Iterable[str], header: Mapping[str, str]) -> str | None:
    """Return the model family from the file's header, or else from its names."""
    for key in _HEADER_KEYS:
        if header.get(key):
            return header[key]
    text = "\n".join(keys)
    return next((family for family, pattern in _FAMILIES.items() if re.search(pattern, text)), None)
