"""Parse `--quantize_to` and its per-component forms before anything loads. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from backends.errors import ConfigError

Kind = Literal["float8", "int8", "int4", "int2", "bnb_int8", "bnb_int4"]
EVERYWHERE = ("float8", "int8", "int4", "int2")
"""Our own weight-only kinds: they need no library and run on every device."""
GROUPS = ("denoiser", "encoders", "vae", "misc")

_TORCHAO = {
    "int8wo": "int8",
    "int4wo": "int4",
    "float8wo": "float8",
    "uint4wo": "int4",
    "uint2wo": "int2",
}
_FLOATS = ("fp32", "fp16", "bf16")
ALLOWED = (
    "float8, int8, int4, int2, bnb,int8 or bnb,int4,COMPUTE,STORAGE,QTYPE (such as "
    "bnb,int4,bf16,int8,nf4)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSpec:
    """How the weights of a component are stored."""

    kind: Kind
    qtype: str = "nf4"  # bnb_int4 only: nf4 or fp4
    compute: str | None = None  # bnb_int4 only: fp32, fp16 or bf16


def parse_quantization(text: str, *, option: str) -> QuantizationSpec:
    """Parse the value of `--option`. ConfigError if it is not allowed.

    torchao's names map to our own kinds.
    """
    parts = [part.strip().lower() for part in text.split(",")]
    if len(parts) == 1 and parts[0] in EVERYWHERE:
        return QuantizationSpec(kind=parts[0])
    if parts[0] == "tao" and len(parts) == 2 and parts[1] in _TORCHAO:
        return QuantizationSpec(kind=_TORCHAO[parts[1]])
    if parts == ["bnb", "int8"]:
        return QuantizationSpec(kind="bnb_int8")
    if (
        parts[:2] == ["bnb", "int4"]
        and len(parts) == 5
        and parts[2] in _FLOATS
        and parts[4] in ("nf4", "fp4")
    ):
        return QuantizationSpec(kind="bnb_int4", compute=parts[2], qtype=parts[4])
    torchao = ", ".join(f"tao,{name}" for name in _TORCHAO) if parts[0] == "tao" else ""
    raise ConfigError(f"--{option}={text} is not allowed. Allowed: {torchao or ALLOWED}.")
