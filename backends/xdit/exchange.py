"""Exchanges between the ranks of a sequence group: Ulysses' heads for tokens, ring attention, and
the gathering at the end.

Shards may differ in length, and the number of ranks need not divide the heads. All sizes are known
on every rank beforehand.
"""

import functools
import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from backends.groups.mesh import Axis, CommStats, Mesh
from backends.groups.shared_memory import shared_memory
from backends.xdit.layout import Layout, sizes, take

HAS_FLASH = (8, 0)
"""Compute capability from which torch has FlashAttention's kernel."""


def tokens_for_heads(
    tensors: Sequence[Tensor], *, lengths: Sequence[int], axis: Axis, traffic: CommStats
) -> tuple[Tensor, ...]:
    """Send most heads of this rank's tokens and receive its own heads of all tokens, for several
    tensors in one message.

    tensors: each (B, H, lengths[axis.rank], D). Returns as many of (B, H_own, sum(lengths), D),
    tokens in rank order. Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3 (all-to-all before
    attention).
    """
    batch, num_heads, _, dim = tensors[0].shape
    heads = sizes(num_heads, axis.size)
    outgoing = list(zip(*(tensor.split(heads, dim=1) for tensor in tensors), strict=True))
    shapes = [(batch, heads[axis.rank], length, dim) for length in lengths]
    incoming = _trade(outgoing, shapes, axis=axis, traffic=traffic)
    return tuple(torch.cat(parts, dim=2) for parts in zip(*incoming, strict=True))


def own_heads(tensors: Sequence[Tensor], *, axis: Axis) -> tuple[Tensor, ...]:
    """Return the heads that this rank has after `tokens_for_heads`, of tensors (B, H, S, D) that
    are whole on every rank.
    """
    return tuple(
        tensor.split(sizes(tensor.shape[1], axis.size), dim=1)[axis.rank] for tensor in tensors
    )


def heads_for_tokens(
    tensor: Tensor, *, num_heads: int, lengths: Sequence[int], axis: Axis, traffic: CommStats
) -> Tensor:
    """Undo `tokens_for_heads`. tensor: (B, H_own, sum(lengths), D). Returns (B, num_heads,
    lengths[axis.rank], D), in memory as (B, S, H, D).
    """
    outgoing = [(part,) for part in tensor.transpose(1, 2).split(list(lengths), dim=1)]
    shapes = [
        (tensor.shape[0], lengths[axis.rank], heads, tensor.shape[3])
        for heads in sizes(num_heads, axis.size)
    ]
    incoming = _trade(outgoing, shapes, axis=axis, traffic=traffic)
    return torch.cat([part for (part,) in incoming], dim=2).transpose(1, 2)


def _trade(
    outgoing: Sequence[Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    *,
    axis: Axis,
    traffic: CommStats,
) -> list[Sequence[Tensor]]:
    """Send the tensors outgoing[i] (of one shape) to rank i of the axis, and receive as many of
    shapes[i] from it.

    This rank's own tensors are not copied. Those of other ranks may be in the memory where their
    ranks wrote them, so they must be read before this rank's next exchange.
    """
    memory = shared_memory(axis) if outgoing[0][0].device.type == "cpu" else None
    incoming = memory.trade(outgoing, shapes, traffic=traffic) if memory is not None else None
    return (
        _trade_by_messages(outgoing, shapes, axis=axis, traffic=traffic)
        if incoming is None
        else incoming
    )


def _trade_by_messages(
    outgoing: Sequence[Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    *,
    axis: Axis,
    traffic: CommStats,
) -> list[Sequence[Tensor]]:
    """Do the same for ranks that share no memory."""
    count = len(outgoing[axis.rank])
    out_sizes = [
        0 if rank == axis.rank else count * parts[0].numel() for rank, parts in enumerate(outgoing)
    ]
    in_sizes = [
        0 if rank == axis.rank else count * math.prod(shape) for rank, shape in enumerate(shapes)
    ]
    sent, received = (outgoing[0][0].new_empty(sum(lengths)) for lengths in (out_sizes, in_sizes))
    for rank, piece in enumerate(sent.split(out_sizes)):
        if rank != axis.rank:
            for place, tensor in zip(
                piece.view(count, *outgoing[rank][0].shape), outgoing[rank], strict=True
            ):
                place.copy_(tensor)
    traffic.add(sent)
    started = time.perf_counter()
    dist.all_to_all_single(
        received, sent, output_split_sizes=in_sizes, input_split_sizes=out_sizes, group=axis.group
    )
    traffic.wait_s += time.perf_counter() - started
    pieces = enumerate(zip(received.split(in_sizes), shapes, strict=True))
    return [
        outgoing[rank] if rank == axis.rank else piece.view(count, *shape).unbind(0)
        for rank, (piece, shape) in pieces
    ]


def gather_tokens(
    tokens: Tensor, *, lengths: Sequence[int], axis: Axis, traffic: CommStats
) -> Tensor:
    """Return the tokens (B, lengths[rank], D) of all ranks in rank order, on every rank."""
    shapes = [(tokens.shape[0], length, tokens.shape[2]) for length in lengths]
    incoming = _trade([(tokens,)] * axis.size, shapes, axis=axis, traffic=traffic)
    return torch.cat([part for (part,) in incoming], dim=1)


def own_mask(
    mask: Tensor, *, own: int, layout: Layout, is_joint: bool, is_text_first: bool, mesh: Mesh
) -> Tensor | None:
    """Return an attention mask for this rank's queries after `tokens_for_heads`, with the keys of
    all ranks in rank order; None if the ranks cannot make it.

    mask: broadcast to (B, H, queries, keys). Of all tokens in the order of the model, or of this
    rank's `own` keys alike for all queries, or of its own queries and keys if both must be there.
    """
    ulysses, ring, both = mesh.axis("ulysses"), mesh.axis("ring"), mesh.axis("ring", "ulysses")
    order = functools.partial(layout.order, is_joint=is_joint, is_text_first=is_text_first)
    group = range(ring.rank * ulysses.size, (ring.rank + 1) * ulysses.size)
    total = layout.num_image + (layout.num_text if is_joint else 0)
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-2] > 1 and mask.stride(-2) == 0:
        mask = mask[..., :1, :]
    rows, columns = mask.shape[-2:]
    if columns == total and rows in (1, total):
        if rows > 1:
            mask = take(mask, order(group), dim=-2)
        mask = take(mask, order(range(both.size)), dim=-1)
    elif columns == own and rows in (1, own):
        is_there = mask.diagonal(dim1=-2, dim2=-1)[..., None, :] if rows > 1 else mask
        if rows > 1 and not torch.equal(mask, is_there & is_there.transpose(-1, -2)):
            return None
        lengths = [layout.shard(index).count(with_text=is_joint) for index in range(both.size)]
        mask = _gather_row(is_there, lengths=lengths, axis=both, traffic=mesh.traffic)
        if rows > 1:
            parts = mask.split(lengths, dim=-1)[group.start : group.stop]
            mask = mask & torch.cat(parts, dim=-1).transpose(-1, -2)
    else:
        return None
    return own_heads((mask,), axis=ulysses)[0] if mask.shape[1] > 1 and ulysses.size > 1 else mask


def _gather_row(mask: Tensor, *, lengths: Sequence[int], axis: Axis, traffic: CommStats) -> Tensor:
    """Return the masks (B, H, 1, keys) of all ranks' keys in rank order, from this rank's."""
    numbers = mask.to(torch.uint8) if mask.dtype == torch.bool else mask
    tokens = numbers[:, :, 0].transpose(1, 2).contiguous()
    tokens = gather_tokens(tokens, lengths=lengths, axis=axis, traffic=traffic)
    return tokens.to(mask.dtype).transpose(1, 2)[:, :, None]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    axis: Axis,
    traffic: CommStats,
    scale: float | None,
    whole: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention (B, H, S, D) of this rank's queries (B, H, S, D) to the keys and values
    of all ranks, which travel around the ring.

    key, value: (B, H or fewer, lengths[axis.rank], D). whole: further keys and values, the same on
    every rank. mask: for these queries and the keys of all ranks in rank order. The next block is
    under way while this one is computed. Parts are merged in float32 by their log-sum-exp. Source:
    Ring Attention, arXiv:2310.01889, section 3.
    """
    block = torch.stack((key, value))
    merged = attention_with_lse(query, *whole, scale=scale) if whole else None
    masks = [mask] * axis.size
    if mask is not None and mask.shape[-1] > 1:
        masks = list(mask.split(list(lengths), dim=-1))
    for step in range(axis.size):
        owner = (axis.rank - step) % axis.size
        pending, arriving = [], None
        if step + 1 < axis.size:
            arriving = block.new_empty((*block.shape[:3], lengths[owner - 1], block.shape[4]))
            pending = _pass_on(block, arriving, axis=axis, traffic=traffic)
        if lengths[owner]:
            part = attention_with_lse(query, block[0], block[1], scale=scale, mask=masks[owner])
            merged = part if merged is None else _merge(merged, part)
        started = time.perf_counter()
        for work in pending:
            work.wait()
        traffic.wait_s += time.perf_counter() - started
        block = arriving if arriving is not None else block
    assert merged is not None  # an image has at least one token
    return merged[0].to(query.dtype)


def _pass_on(block: Tensor, arriving: Tensor, *, axis: Axis, traffic: CommStats) -> list[dist.Work]:
    """Start sending `block` to the next rank of the ring and receiving the previous rank's into
    `arriving`.
    """
    ahead, behind = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    traffic.add(block)
    send = dist.P2POp(dist.isend, block.contiguous(), ahead, group=axis.group)
    receive = dist.P2POp(dist.irecv, arriving, behind, group=axis.group)
    return dist.batch_isend_irecv([send, receive])


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attention (B, H, S, D) and the log of its softmax denominators (B, H, S), in
    float32. A query that sees no key has 0 and minus infinity.
    """
    if query.shape[1] == 0 or query.shape[2] == 0:
        return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    key, value = (repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    bias = None if mask is None else _bias(mask, query, key)
    if query.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    elif (
        bias is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= HAS_FLASH
    ):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, scale=scale
        )[:2]
    else:  # the flash kernel takes no float32 and no mask, and Turing has none
        output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, scale=scale
        )[:2]
    output, lse = output.float(), lse[:, :, : query.shape[2]].float()  # some kernels pad rows
    if bias is None:
        return output, lse
    blind = (bias == -math.inf).all(dim=-1)  # kernels disagree about their results
    return output.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -math.inf)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return what is added to the scores (B, H, S, K), in the dtype of the query. Its rows begin at
    multiples of 16 bytes, as CUDA's kernel wants it.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    shape = (*query.shape[:3], key.shape[2])
    bias = mask.to(query.dtype).expand(*mask.shape[:-1], shape[-1])
    return F.pad(bias, (0, -shape[-1] % 8))[..., : shape[-1]].expand(shape)


def repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Return keys or values (B, H, S, D) of grouped queries once for each of their query heads."""
    return (
        tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1)
        if (tensor.shape[1] not in (0, num_heads))
        else tensor
    )


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two parts of one softmax, each normalised over its own keys."""
    lse = torch.logaddexp(first[1], second[1])
    level = lse.masked_fill(lse == -math.inf, 0)  # where no key was seen yet
    output = (
        first[0] * (first[1] - level).exp()[..., None]
        + second[0] * (second[1] - level).exp()[..., None]
    )
    return output, lse


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return torch's own attention; empty where this rank has no head (more ranks than heads) or no
    query.
    """
    if query.shape[1] == 0 or query.shape[2] == 0:
        return torch.empty_like(query)
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=is_grouped
    )
