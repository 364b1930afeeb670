"""CFG split: the negative and the positive half of a batch run on two halves of the ranks.

The split is exact and shared by all backends. It cuts the denoiser's batch along dim 0 and gathers
the outputs, so no pipeline's guidance code has to change. A batch of several prompts is split the
same way. An odd batch (one image without guidance) is computed whole on every rank.
cfg_two_calls.py covers pipelines that call their denoiser once for each half.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from backends.groups.collectives import all_gather
from backends.groups.mesh import Axis, Mesh
from backends.parallel import hooks

NAME = "cfg split"
"""Hook name of the split over the `cfg` axis. Other axes use `<axis> split`."""

_BATCHED = frozenset(
    "sample timestep class_labels timestep_cond encoder_hidden_states attention_mask "
    "cross_attention_kwargs added_cond_kwargs "
    "added_time_ids down_block_additional_residuals mid_block_additional_residual "
    "down_intrablock_additional_residuals "
    "encoder_attention_mask hidden_states pooled_projections guidance "
    "block_controlnet_hidden_states controlnet_block_samples "
    "controlnet_single_block_samples joint_attention_kwargs text_embedding_mask "
    "encoder_hidden_states_t5 text_embedding_mask_t5 "
    "image_meta_size style encoder_hidden_states_mask encoder_hidden_states_image "
    "x t cap_feats".split()
)
"""Arguments of diffusers' denoisers that carry the batch in dim 0. Position tables (img_ids,
image_rotary_emb, ...) do not.
"""


def attach_batch_split(denoiser: nn.Module, mesh: Mesh, *, axis: str = "cfg") -> None:
    """Split every call of this denoiser over an axis of the mesh.

    Attach it last: it must see the whole batch.
    """
    if mesh.axis(axis).size > 1:
        hooks.attach(denoiser, _name(axis), _split_call(denoiser, mesh, axis))


def detach_batch_split(denoiser: nn.Module, *, axis: str = "cfg") -> None:
    """Remove the split over `axis`, if there is one."""
    if _name(axis) in hooks.attached(denoiser):
        hooks.detach(denoiser, _name(axis))


def _name(axis: str) -> str:
    return f"{axis} split"


def _split_call(denoiser: nn.Module, mesh: Mesh, axis_name: str) -> Callable[..., Any]:
    names = [
        name for name in inspect.signature(type(denoiser).forward).parameters if name != "self"
    ]

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        batch = len(arguments[names[0]])
        axis = mesh.axis(axis_name)
        if batch % axis.size:
            return forward(**arguments)
        return _gather(
            forward(**cut_batch(arguments, batch, parts=axis.size, part=axis.rank)), mesh, axis
        )

    return around


def cut_batch(arguments: Mapping[str, Any], batch: int, *, parts: int, part: int) -> dict[str, Any]:
    """Return the denoiser arguments for part `part` of `parts` equal parts of the batch.

    If the first argument is a list, it and the other list arguments hold one entry per image.
    """
    samples = slice(part * batch // parts, (part + 1) * batch // parts)
    is_listed = isinstance(next(iter(arguments.values())), list)
    mine = dict(arguments)
    for name in _BATCHED.intersection(arguments):
        value = arguments[name]
        mine[name] = (
            value[samples]
            if is_listed and isinstance(value, list)
            else _cut(value, batch, parts, part)
        )
    return mine


def _cut(value: Any, batch: int, parts: int, part: int) -> Any:
    """Return one part of each tensor in `value` with the batch (or batch x frames) in dim 0."""
    if torch.is_tensor(value):
        is_batched = value.dim() > 0 and value.shape[0] >= batch and value.shape[0] % batch == 0
        return value.chunk(parts)[part] if is_batched else value
    if isinstance(value, dict):
        return {key: _cut(item, batch, parts, part) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(item, batch, parts, part) for item in value)
    return value


def _gather(output: Any, mesh: Mesh, axis: Axis) -> Any:
    part = torch.stack(output[0]) if isinstance(output[0], list) else output[0]
    whole: Any = all_gather(part, dim=0, axis=axis, traffic=mesh.traffic)
    if isinstance(output[0], list):
        whole = list(whole.unbind(0))
    return (whole, *output[1:]) if isinstance(output, tuple) else type(output)(sample=whole)
