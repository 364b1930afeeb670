"""Attach behaviour to one module instance and remove it again.

No other code replaces a module's forward. diffusers' HookRegistry is not used because removing one
of two `new_forward` hooks also drops the other (0.42.1).
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""around(forward, *args, **kwargs): called instead of the module's forward, which it may call."""

_STACK = "_attached_forwards"


def attach(module: nn.Module, name: str, around: Around) -> None:
    """Run `around(forward, *args, **kwargs)` instead of this instance's forward.

    The last hook attached is the outermost. ValueError if `name` is already attached.
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
    """Restore the forward from before `attach(module, name, ...)`.

    ValueError unless `name` is the outermost hook.
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
    """Return the names of the hooks on this instance, innermost first."""
    return [name for name, _, _ in module.__dict__.get(_STACK, [])]
