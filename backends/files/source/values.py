"""Values of code that is read and not run: plain ones, PIL images, arrays, and stand-ins for what
torch would make.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


class Unknown:
    """The value of what cannot be told without running the code."""

    def __repr__(self) -> str:
        return "..."


UNKNOWN = Unknown()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of which the shape is known."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Generator:
    """A torch.Generator."""


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline, of which the configuration is known."""

    config: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, type] = {
    **{kind.__name__: kind for kind in (str, bytes, int, float, bool, list, tuple, dict, set)},
    "PIL.Image.Image": Image.Image,
    "Image.Image": Image.Image,
    "PIL.Image": Image.Image,
    "torch.Tensor": Tensor,
    "Tensor": Tensor,
    "torch.FloatTensor": Tensor,
    "torch.Generator": Generator,
    "Mapping": Mapping,
}
"""Types as diffusers writes them -> what stands for them here."""
PLAIN = (str, bytes, int, float, bool, list, tuple, dict, set, range, type, type(None))
FACTS: dict[type, tuple[str, ...]] = {
    Image.Image: ("size", "width", "height", "mode"),
    Tensor: ("shape", "ndim"),
    Component: ("config",),
}
"""Type -> attributes that say the same here as in the code."""
METHODS: dict[type, tuple[str, ...]] = {
    str: ("strip", "lower", "upper", "startswith", "endswith", "split"),
    dict: ("keys", "values", "items", "get"),
    Tensor: ("dim", "size"),
}
"""Type -> methods that change nothing."""
CALLS = {
    each.__name__: each
    for each in (len, abs, min, max, sum, any, all, round, int, float, str, bool, list, tuple, set,
                 sorted, range, zip, enumerate, type)
}  # fmt: skip
LONGEST = 10_000
"""Values in a list that is made."""


def kind_of(name: str) -> type | Unknown:
    if name in ("np.ndarray", "numpy.ndarray"):
        import numpy as np  # which --help and --list do without

        return np.ndarray
    return KINDS.get(name, UNKNOWN)


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "shape")


def attribute_of(value: Any, name: str) -> Any:
    """Return an attribute of a value; UNKNOWN if it is not one that is known here."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        return value.get(name, UNKNOWN)  # a configuration
    known = (names for kind, names in FACTS.items() if isinstance(value, kind))
    has_it = any(name in names for names in known)
    has_it = has_it or (_is_array(value) and name in ("shape", "ndim", "size"))
    return getattr(value, name) if has_it else UNKNOWN


def method_result(value: Any, name: str, arguments: list[Any]) -> Any:
    """Return what a method returns that changes nothing; UNKNOWN for others."""
    if isinstance(value, Tensor) and name in METHODS[Tensor]:
        if name == "dim":
            return value.ndim
        return value.shape[arguments[0]] if arguments else value.shape
    known = (names for kind, names in METHODS.items() if isinstance(value, kind))
    if not any(name in names for names in known) or UNKNOWN in arguments:
        return UNKNOWN
    result = getattr(value, name)(*arguments)
    return result if isinstance(result, PLAIN) else list(result)


def truth_of(value: Any) -> bool | Unknown:
    if isinstance(value, Unknown | Tensor) or _is_array(value):
        return UNKNOWN
    return bool(value)
