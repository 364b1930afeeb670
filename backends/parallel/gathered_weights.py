"""Divides the weights of models among ranks, and gathers a block's weights when it runs.

Each rank keeps an equal share of the bytes of every block. A block's weights are gathered from all
ranks before its forward, while the block before it computes, and dropped after it. So a rank holds
its share and two blocks, and every result is that of whole weights, bit for bit. All ranks must run
the same blocks in the same order.

Source: FSDP, arXiv:2304.11277. torch's `fully_shard` is not used: it takes no integers (packed
weights, GGUF), changes the class of the modules, and keeps its process group, while a mesh replaces
its groups after a failure.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from backends.groups.collectives import begin_gather_into
from backends.groups.mesh import Axis, CommStats
from backends.parallel import hooks
from backends.parallel.weight_shards import Weight, placeholder, read_meanwhile, weights_of

NAME = "gathered weights"
_PLACE = "_divided_block"
ALIGNMENT = 64
"""Bytes. Kernels may sum in another order on data that is aligned less."""
IN_LISTS = 0.9
"""Fraction of a block's weights above which the lists inside it hold the blocks."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Piece:
    """One tensor of a block."""

    weight: Weight
    placeholder: Tensor  # of its shape, without memory
    first: int  # byte in the block
    num_bytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Block:
    pieces: list[_Piece]
    share: Tensor  # uint8, this rank's part of the block's bytes
    num_bytes: int


class GatheredWeights:
    """The divided blocks of one pipeline. `take` divides a block; `use` sets the ranks."""

    def __init__(self, *, rank: int, size: int) -> None:
        """rank: which of `size` shares this rank keeps."""
        self._rank, self._size = rank, size
        self._blocks: list[_Block] = []
        self._next: dict[int, int] = {}
        self._last: int | None = None
        self._pending: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._axis: Axis | None = None
        self._traffic = CommStats()

    def take(self, module: nn.Module, *, device: torch.device) -> None:
        """Keep this rank's share of a block on the device, and drop the rest. Not collective."""
        pieces, first = [], 0
        for weight in weights_of([module]):
            tensor = weight.tensor
            if not tensor.numel():
                continue
            num_bytes = tensor.numel() * tensor.element_size()
            pieces.append(
                _Piece(
                    weight=weight,
                    placeholder=placeholder(tensor, device),
                    first=first,
                    num_bytes=num_bytes,
                )
            )
            first += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        total = -(-first // (ALIGNMENT * self._size)) * ALIGNMENT * self._size
        share = _share(pieces, total // self._size, self._rank).to(device)
        for piece in pieces:
            piece.weight.put(piece.placeholder)
        index = len(self._blocks)
        for part in module.modules():
            part.__dict__[_PLACE] = (self, index)
        self._blocks.append(_Block(pieces=pieces, share=share, num_bytes=total))
        hooks.attach(module, NAME, self._around(index))

    def use(self, axis: Axis, traffic: CommStats) -> None:
        """Gather from the ranks of this axis from now on. ValueError unless they hold the shares.

        traffic: counts what is sent.
        """
        if (axis.rank, axis.size) != (self._rank, self._size):
            raise ValueError(
                f"rank {axis.rank} of {axis.size} cannot gather weights that were divided as "
                f"{self._rank} of {self._size}"
            )
        self._axis, self._traffic = axis, traffic

    def begin(self) -> None:
        """Forget in which order the last run used the blocks, as another rank may not know it."""
        self._next, self._last = {}, None

    def end(self, *, is_out_of_step: bool) -> None:
        """Finish the gathering of blocks that did not run, or drop it where other ranks may not
        have begun it. A cancelled run is none of these: all ranks stop at the same step.
        """
        if not is_out_of_step:
            self._finish_pending()
        self._pending.clear()
        for block in self._blocks if is_out_of_step else ():
            _drop(block)

    def move(self, device: torch.device) -> None:
        """Move the shares to another device."""
        for block in self._blocks:
            block.share = block.share.to(device)
            for piece in block.pieces:
                piece.placeholder = placeholder(piece.placeholder, device)
                piece.weight.put(piece.placeholder)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shares that this rank keeps."""
        return sum(block.share.numel() for block in self._blocks)

    @contextmanager
    def whole(self, index: int) -> Iterator[None]:
        """Gather a block's weights for other code than its forward. Collective."""
        if self._axis is None:
            yield  # LoRAs are set once more when the ranks are known
            return
        buffer, wait = self._start(index)
        wait()
        _fill(self._blocks[index], buffer)
        try:
            yield
        finally:
            _drop(self._blocks[index])

    def _around(self, index: int) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            block = self._blocks[index]
            if index not in self._pending:
                # gathered for nothing: a text encoder, called twice, is expected a third time
                self._finish_pending()
            buffer, wait = self._pending.pop(index, None) or self._start(index)
            if self._last is not None:
                self._next[self._last] = index
            self._last = index
            wait()
            following = self._next.get(index)
            if following not in (None, index) and following not in self._pending:
                self._pending[following] = self._start(following)
            _fill(block, buffer)
            try:
                return forward(*args, **kwargs)
            finally:
                _drop(block)

        return around

    def _finish_pending(self) -> None:
        """Let go of blocks that do not run, whose memory would be held until the end."""
        for _, wait in self._pending.values():
            wait()
        self._pending.clear()

    def _start(self, index: int) -> tuple[Tensor, Callable[[], None]]:
        if self._axis is None:
            raise RuntimeError("divided weights were used before their ranks were set")
        block = self._blocks[index]
        buffer = torch.empty(block.num_bytes, dtype=torch.uint8, device=block.share.device)
        return buffer, begin_gather_into(
            buffer, block.share, axis=self._axis, traffic=self._traffic
        )


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Let code read this module's weights outside its block's forward, on all ranks alike: those
    that are divided, and those that are not read yet.
    """
    gathered, index = module.__dict__.get(_PLACE, (None, 0))
    with gathered.whole(index) if gathered is not None else read_meanwhile(module):
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the items of its lists, in which almost all weights are.

    A block with almost all its weights in lists of its own (a UNet's levels, a layer of T5) is not
    one, and theirs are.
    """
    found: list[nn.Module] = []
    for items in _lists(model):
        for item in items:
            if math.isclose(size := _size(item), 0.0):
                continue
            in_lists = sum(_size(inner) for inner in _lists(item))
            found += blocks_of(item) if in_lists >= IN_LISTS * size else [item]
    return found


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, ParametrizationList):
            continue  # the packed weight of one layer
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _lists(child)


def _size(module: nn.Module) -> float:
    # packed weights are buffers
    tensors = (*module.parameters(), *module.buffers())
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _share(pieces: list[_Piece], num_bytes: int, rank: int) -> Tensor:
    """Return the bytes of a block from rank * num_bytes on. Reads no others."""
    share = torch.zeros(num_bytes, dtype=torch.uint8)
    start, stop = rank * num_bytes, (rank + 1) * num_bytes
    for piece in pieces:
        begin, end = max(start, piece.first), min(stop, piece.first + piece.num_bytes)
        if begin < end:
            content = piece.weight.tensor.data.contiguous().view(-1).view(torch.uint8)
            share[begin - start : end - start] = content[begin - piece.first : end - piece.first]
    return share


def _fill(block: _Block, buffer: Tensor) -> None:
    for piece in block.pieces:
        part = buffer[piece.first : piece.first + piece.num_bytes]
        piece.weight.put(part.view(piece.placeholder.dtype).view(piece.placeholder.shape))


def _drop(block: _Block) -> None:
    for piece in block.pieces:
        piece.weight.put(piece.placeholder)
