"""How a class counts its guidance. Imports no torch.

Most follow uncond + scale * (cond - uncond), where 1 is off. A few follow cond + scale * (cond -
uncond), where 0 is off and all else is one less than others call it.
"""

from typing import Any

from backends.files.call_rules import is_guided_at
from backends.model_table import ModelSpec


def above_scale(spec: ModelSpec) -> float:
    """Return by how much the usual scale is above the class's own: 1 or 0."""
    is_usual = spec.guidance != "cfg" or is_guided_at(spec.pipeline, 1.0) is not True
    return 0.0 if is_usual else 1.0


def own_scale(cfg_scale: Any, spec: ModelSpec) -> Any:
    """Return the class's own scale for the usual one. What is none is returned as it is."""
    above = above_scale(spec)
    try:
        usual = float(cfg_scale)
    except (TypeError, ValueError, OverflowError):
        return cfg_scale
    return max(usual - above, 0.0) if above and usual >= 0 else cfg_scale
