"""What `--quantize_to` and its split forms may say -> a checked choice. Imports no torch: wrong
ones are refused before anything loads.
"""

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
    """How the weights of a component are kept."""

    kind: Kind
    qtype: str = "nf4"  # of bitsandbytes' 4 bits: nf4 or fp4
    compute: str | None = None  # of bitsandbytes' 4 bits: a dtype's short name


def parse_quantization(text: str, *, option: str) -> QuantizationSpec:
    """ConfigError names the option and what is allowed. torchao's names are understood; the work is
    done by our own kinds.
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
