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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
_NUMBER = "_number_of_call"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hook:
    name: str
    around: Around
    stays_outside: bool
    forward: Callable[..., Any]
    previous: Callable[..., Any] | None  # the instance's own forward before, if it had one


def attach(module: nn.Module, name: str, around: Around, *, stays_outside: bool = False) -> None:
    """Run `around(forward, *args, **kwargs)` instead of this instance's forward.

    The last hook attached is the outermost, except that one with `stays_outside` is around all
    that are attached later. ValueError if `name` is already attached.
    """
    if name in attached(module):
        raise ValueError(
            f"{name!r} is already attached to this {type(module).__name__}. Detach it first."
        )
    with _without_outside(module):
        _push(module, name, around, stays_outside=stays_outside)


def detach(module: nn.Module, name: str) -> None:
    """Restore the forward from before `attach(module, name, ...)`.

    ValueError unless `name` is the outermost hook, or the outermost but those that stay outside.
    """
    if name in [hook.name for hook in _stack(module) if hook.stays_outside]:
        _pop(module, name)
    else:
        with _without_outside(module):
            _pop(module, name)


def attached(module: nn.Module) -> list[str]:
    """Return the names of the hooks on this instance, innermost first."""
    return [hook.name for hook in _stack(module)]


def set_call_number(module: nn.Module, number: int | None) -> None:
    """Tell the hooks inside which of a step's calls is next, where other ranks make the calls
    between; None: count them.
    """
    module.__dict__[_NUMBER] = number


def call_number(module: nn.Module, *, counted: int) -> int:
    """Return which of a step's calls this is. counted: the calls that were made on this rank."""
    number = module.__dict__.get(_NUMBER)
    return counted if number is None else number


def _stack(module: nn.Module) -> list[_Hook]:
    return module.__dict__.get(_STACK, [])


def _push(module: nn.Module, name: str, around: Around, *, stays_outside: bool) -> None:
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    module.__dict__.setdefault(_STACK, []).append(
        _Hook(
            name=name,
            around=around,
            stays_outside=stays_outside,
            forward=forward,
            previous=module.__dict__.get("forward"),
        )
    )
    module.forward = forward


def _pop(module: nn.Module, name: str) -> _Hook:
    stack = _stack(module)
    if (
        not stack
        or stack[-1].name != name
        or module.__dict__.get("forward") is not stack[-1].forward
    ):
        raise ValueError(
            f"{name!r} is not the outermost of {attached(module)} on this {type(module).__name__}. "
            "Detach in reverse order."
        )
    hook = stack.pop()
    if hook.previous is None:
        del module.forward
    else:
        module.forward = hook.previous
    if not stack:
        del module.__dict__[_STACK]
    return hook


@contextmanager
def _without_outside(module: nn.Module) -> Iterator[None]:
    """Take off the hooks that stay outside, and put them back in the same order."""
    outside = [_pop(module, hook.name) for hook in reversed(_stack(module)) if hook.stays_outside]
    try:
        yield
    finally:
        for hook in reversed(outside):
            _push(module, hook.name, hook.around, stays_outside=True)


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


def output_parts(output: Any) -> list[Any]:
    """Return the values of a denoiser's result, the prediction first: of a tuple, or of any output
    class of diffusers.
    """
    return list(output) if isinstance(output, tuple) else list(output.values())


def rebuilt(output: Any, parts: Sequence[Any]) -> Any:
    """Return a result of the same kind with these values."""
    if isinstance(output, tuple):
        return tuple(parts)
    return type(output)(**dict(zip(output.keys(), parts, strict=True)))
