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
from backends.parallel.hooks import output_parts, rebuilt

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
"""Arguments of diffusers' denoisers that may carry batch x frames in dim 0, or a list of images.
The batch alone is known by its length.
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
        return gather_batch(
            forward(**cut_batch(arguments, batch, parts=axis.size, part=axis.rank)), mesh, axis
        )

    return around


def cut_batch(
    arguments: Mapping[str, Any], batch: int, *, parts: int, part: int, second_dim: bool = False
) -> dict[str, Any]:
    """Return the denoiser arguments for part `part` of `parts` equal parts of the batch.

    If the first argument is a list, it and the other list arguments hold one entry per image.
    second_dim: cut those of batched_in_second_dim in dim 1.
    """
    is_listed = isinstance(next(iter(arguments.values())), list)
    cut = {
        name: _cut(value, name, batch, parts, part, is_listed=is_listed)
        for name, value in arguments.items()
    }
    if second_dim:
        for name in batched_in_second_dim(arguments, batch):
            cut[name] = arguments[name].chunk(parts, dim=1)[part]
    return cut


def batched_in_second_dim(arguments: Mapping[str, Any], batch: int) -> list[str]:
    """Return the names of tensors that may be (layers, batch, tokens, channels): some denoisers get
    the states of several layers of a text encoder.
    """
    return [
        name
        for name, value in list(arguments.items())[1:]
        if torch.is_tensor(value) and value.dim() > 3 and value.shape[1] == batch
    ]


def _cut(value: Any, name: str, batch: int, parts: int, part: int, *, is_listed: bool) -> Any:
    """Return one part of each tensor in `value` that has the batch in dim 0.

    Known arguments may have batch x frames there. Of a list of images, its own slice.
    """
    if torch.is_tensor(value):
        return value.chunk(parts)[part] if _is_batched(value, name, batch) else value
    if is_listed and name in _BATCHED and isinstance(value, list):
        return value[part * batch // parts : (part + 1) * batch // parts]
    rest = {"batch": batch, "parts": parts, "part": part, "is_listed": False}
    if isinstance(value, dict):
        return {key: _cut(item, name, **rest) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cut(item, name, **rest) for item in value)
    return value


def _is_batched(tensor: torch.Tensor, name: str, batch: int) -> bool:
    if tensor.dim() == 0:
        return False
    is_table = "rotary" in name or (name.endswith("_ids") and tensor.dim() == 2)
    if is_table and name not in _BATCHED:
        return False  # of positions; it may have as many rows as the batch
    length = tensor.shape[0]
    return length == batch or (name in _BATCHED and length > batch and length % batch == 0)


def gather_batch(output: Any, mesh: Mesh, axis: Axis) -> Any:
    """Return the denoiser's result for the whole batch, from each rank's part of it.

    All of its tensors that have the batch in dim 0 are gathered.
    """
    values = output_parts(output)
    size = len(values[0])

    def whole(value: Any) -> Any:
        if isinstance(value, list) and value and torch.is_tensor(value[0]):
            joined = all_gather(torch.stack(value), dim=0, axis=axis, traffic=mesh.traffic)
            return list(joined.unbind(0))
        if torch.is_tensor(value) and value.dim() and len(value) == size:
            return all_gather(value, dim=0, axis=axis, traffic=mesh.traffic)
        return value

    return rebuilt(output, [whole(value) for value in values])
