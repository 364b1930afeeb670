"""Attach behaviour to one module instance, and take it off again: the only code that replaces a
module's forward.

diffusers' own HookRegistry is not used because removing one of two `new_forward` hooks drops the
other (0.42.1).
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""around(forward, *args, **kwargs): called in place of the module's forward, which it may call."""

_STACK = "_attached_forwards"


def attach(module: nn.Module, name: str, around: Around) -> None:
    """Run `around(forward, *args, **kwargs)` instead of this instance's forward; the last attached
    is the outermost.
    """
    stack = module.__dict__.setdefault(_STACK, [])
    if name in attached(module):
        raise ValueError(
            f"{name!r} is already attached to this {type(module).__name__}. Detach it first."
        )
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    stack.append((name, module.__dict__.get("forward"), forward))
    module.forward = forward


def detach(module: nn.Module, name: str) -> None:
    """Give the instance back the forward it had before `attach(module, name, ...)`. Last on, first
    off.
    """
    stack = module.__dict__.get(_STACK, [])
    if not stack or stack[-1][0] != name or module.__dict__.get("forward") is not stack[-1][2]:
        raise ValueError(
            f"{name!r} is not the outermost of {attached(module)} on this {type(module).__name__}. "
            "Detach in reverse order."
        )
    _, previous, _ = stack.pop()
    if previous is None:
        del module.forward
    else:
        module.forward = previous
    if not stack:
        del module.__dict__[_STACK]


def attached(module: nn.Module) -> list[str]:
    """Names attached to this instance, innermost first."""
    return [name for name, _, _ in module.__dict__.get(_STACK, [])]
