"""Attach behaviour to one module instance and remove it again, and replace torch's attention
operator while one attention module runs.

No other code replaces a module's forward. diffusers' HookRegistry is not used because removing one
of two `new_forward` hooks also drops the other (0.42.1).

For the attention operator a TorchFunctionMode would do, and costs 3 microseconds for each torch
function under it: on a deep network a third of a step's launches. So F.scaled_dot_product_attention
is replaced, for this thread and the time of one module's forward. Other threads get torch's own.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Around = Callable[..., Any]
"""around(forward, *args, **kwargs): called instead of the module's forward, which it may call."""

Attend = Callable[..., Tensor]
"""attend(query, key, value, attn_mask, ...): called with the arguments of torch's operator. Inside
it the operator is torch's own again.
"""

_PASSED_ON = {
    Attention.forward: ("hidden_states", "encoder_hidden_states", "attention_mask"),
    FluxAttention.forward: (
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "image_rotary_emb",
    ),
}
"""Forwards that only pass these arguments to the module's processor, under the same names."""

_torch_attention = F.scaled_dot_product_attention
_thread = threading.local()
_lock = threading.Lock()
_num_open = 0

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


def with_attention(attend: Attend, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return forward(*args, **kwargs), in which `attend` replaces scaled_dot_product_attention."""
    if torch.compiler.is_compiling():
        with _Traced(attend):  # a graph may contain a mode, but no change of a module of torch
            return forward(*args, **kwargs)
    outer = getattr(_thread, "attend", None)
    _thread.attend = attend
    _count(1)
    try:
        return forward(*args, **kwargs)
    finally:
        _count(-1)
        _thread.attend = outer


def run_attention(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return forward(*args, **kwargs) of an attention module, without its search for arguments that
    the processor would not accept, where there are none to find.

    diffusers reads the processor's signature in every call: as long as three launches take.
    """
    names = _PASSED_ON.get(getattr(forward, "__func__", None), ())
    if len(args) > len(names) or not kwargs.keys() <= set(names):
        return forward(*args, **kwargs)
    return module.processor(module, **dict(zip(names, args, strict=False)), **kwargs)


def _count(change: int) -> None:
    """Count the forwards under way; the operator is replaced while there is one."""
    global _num_open
    with _lock:
        _num_open += change
        F.scaled_dot_product_attention = _attention if _num_open else _torch_attention


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    attend = getattr(_thread, "attend", None)
    if attend is None:  # another thread's call, or one inside `attend`
        return _torch_attention(*args, **kwargs)
    _thread.attend = None
    try:
        return attend(*args, **kwargs)
    finally:
        _thread.attend = attend


class _Traced(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _torch_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
