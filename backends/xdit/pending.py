"""A prediction whose patches are still on their way, and what a pipeline makes of it meanwhile,
patch by patch.

Guidance and most schedulers work pixel by pixel, so that the first patch of the next latents is
known as soon as the first patch of this prediction is there. `Arriving` stands for the whole tensor
in the pipeline's untouched loop: arithmetic on it is written down for each patch and done when
somebody asks for that patch; anything else waits for all patches and goes on with a plain tensor.

Source: PipeFusion, arXiv:2405.14430, section 4.1: patch 0 enters the first stage for the next step
while later patches are under way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from backends.groups.collectives import all_gather
from backends.xdit.layout import Span

aten = torch.ops.aten
PIXELWISE = frozenset(
    {
        *(
            aten.add.Tensor,
            aten.add.Scalar,
            aten.sub.Tensor,
            aten.sub.Scalar,
            aten.rsub.Tensor,
            aten.rsub.Scalar,
            aten.mul.Tensor,
        ),
        *(
            aten.mul.Scalar,
            aten.div.Tensor,
            aten.div.Scalar,
            aten.neg.default,
            aten.clone.default,
            aten.detach.default,
        ),
        *(aten._to_copy.default, aten.cat.default, aten.split.Tensor),
    }
)
"""Operators whose result at one pixel depends on that pixel alone, if they cut or join along
another dimension.
"""
CUTS = frozenset({aten.split.Tensor, aten.detach.default})
"""Those whose results are views of what they are given."""


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Where the patches of an image are. spans: image tokens of each; side: pixels of a token's
    side.

    side=None: tensors (B, N, C) of tokens, else maps (B, C, H, W) with the tokens in rows. width:
    tokens in a row.
    """

    spans: tuple[Span, ...]
    side: int | None
    width: int

    @classmethod
    def of(cls, latents: Tensor, spans: Sequence[Span], patch_size: int) -> "PatchGrid | None":
        """That of a denoiser's input; None if its tokens are not those that the spans tell of."""
        is_map = latents.dim() == 4
        grid = cls(
            tuple(spans),
            patch_size if is_map else None,
            latents.shape[-1] // patch_size if is_map else 0,
        )
        return grid if grid.fits(latents) else None

    def fits(self, tensor: Tensor) -> bool:
        """Whether this is a tensor of the whole image."""
        if self.side is None:
            return tensor.dim() == 3 and tensor.shape[1] == self.spans[-1][1]
        if tensor.dim() != 4 or tensor.shape[3] != self.width * self.side:
            return False
        return (
            tensor.shape[2] % self.side == 0
            and tensor.shape[2] // self.side * self.width == self.spans[-1][1]
        )

    @property
    def free_dims(self) -> tuple[int, int]:
        """Dimensions in which a tensor can be cut or joined patch by patch."""
        return (0, 2) if self.side is None else (0, 1)

    def take(self, tensor: Tensor, patch: int) -> Tensor:
        """A copy of a patch: (B, n, C), or (B, C, n, side, side)."""
        if self.side is None:
            return tensor[:, slice(*self.spans[patch])].clone()
        return self._tokens(tensor)[(slice(None), slice(None), *self._cells(patch, tensor.device))]

    def put(self, tensor: Tensor, patch: int, piece: Tensor) -> None:
        """The reverse, into a whole tensor."""
        if self.side is None:
            tensor[:, slice(*self.spans[patch])] = piece
        else:
            self._tokens(tensor)[(slice(None), slice(None), *self._cells(patch, tensor.device))] = (
                piece
            )

    def piece_shape(self, whole: torch.Size, patch: int) -> tuple[int, ...]:
        count = self.spans[patch][1] - self.spans[patch][0]
        return (
            (whole[0], count, whole[2])
            if self.side is None
            else (whole[0], whole[1], count, self.side, self.side)
        )

    def _tokens(self, tensor: Tensor) -> Tensor:
        """(B, C, H, W) as (B, C, rows, columns, side, side), in the same memory."""
        assert self.side is not None
        return tensor.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side)).transpose(3, 4)

    def _cells(self, patch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(*self.spans[patch], device=device)
        return tokens // self.width, tokens % self.width


class Deferred:
    """One patch, made when it is first asked for and kept."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def get(self) -> Any:
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


class PendingTensor(Tensor):
    """A tensor of which each patch is a Piece. `shape`, `dtype` and `device` are those of the
    whole.
    """

    grid: PatchGrid
    gathered: "PendingTensor | None"
    """Both halves of guidance, where this is one of them and the other's patches are on their way
    here too: what `all_gather` gives.
    """
    _pieces: list[Deferred]
    _buffer: Tensor | None
    _filled: set[int]
    _is_cut: bool

    @staticmethod
    def __new__(
        cls,
        pieces: Sequence[Deferred],
        grid: PatchGrid,
        like: Tensor,
        device: torch.device,
        *,
        is_cut: bool = False,
    ) -> Self:
        """like: of the whole's shape and dtype, on any device. is_cut: torch would make this a view
        of what it was cut from.
        """
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        made.grid, made._pieces, made._buffer, made._filled, made._is_cut = (
            grid,
            list(pieces),
            None,
            set(),
            is_cut,
        )
        made.gathered = None
        return made

    @property
    def buffer(self) -> Tensor:
        """The plain tensor of the whole, zero where no patch has been filled in."""
        if self._buffer is None:
            self._buffer = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self._buffer

    @property
    def is_whole(self) -> bool:
        return len(self._filled) == len(self.grid.spans)

    def fill(self, patch: int) -> None:
        """Wait for a patch and put it into the buffer."""
        if patch not in self._filled:
            self.grid.put(self.buffer, patch, self._pieces[patch].get())
            self._filled.add(patch)

    def whole(self) -> Tensor:
        """Wait for all patches: the plain tensor, which is this one's memory from now on."""
        for patch in range(len(self.grid.spans)):
            self.fill(patch)
        return self.buffer

    def pieces(self) -> list[Deferred]:
        """Of this tensor as it is now."""
        if not self.is_whole:
            return self._pieces
        return [_ready(self.grid.take(self.buffer, patch)) for patch in range(len(self.grid.spans))]

    def numpy(self, *, force: bool = False) -> Any:
        return self.whole().numpy(force=force)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"Arriving({tuple(self.shape)}, {self.dtype}, {len(self._filled)} of "
            f"{len(self.grid.spans)} patches)"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is all_gather and args[0].gathered is not None and kwargs["axis"].name == "cfg":
            return args[0].gathered
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # Tensor's own would make plain results Arriving again
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = (tuple(args), kwargs or {})
        if func in PIXELWISE and (result := _by_patch(func, call)) is not None:
            return result
        changed = args[0] if func._schema.is_mutable and args and isinstance(args[0], cls) else None
        if changed is not None and changed._is_cut:
            raise RuntimeError(
                f"{func} would change a part of a prediction in place, and the whole not with it. "
                "Clone the part first."
            )
        args, kwargs = tree_map(_plain, call)
        result = func(*args, **kwargs)
        return result if changed is None else changed


def _by_patch(func: Any, call: Any) -> Any:
    """The call written down for each patch; None if it cannot be, or all patches are there
    anyway.
    """
    values, structure = tree_flatten(call)
    arriving = [value for value in values if isinstance(value, PendingTensor)]
    grid = arriving[0].grid
    if all(value.is_whole for value in arriving) or not all(
        _has_patches(value, grid) for value in values
    ):
        return None
    like = func(
        *(shaped := tree_unflatten([_meta(value) for value in values], structure))[0], **shaped[1]
    )
    wholes = like if isinstance(like, list | tuple) else [like]
    if not all(grid.fits(whole) for whole in wholes):  # cut or joined within the image
        return None
    if func in (aten.cat.default, aten.split.Tensor) and _dim(func, call) not in grid.free_dims:
        return None
    # plain operands may be changed before a patch is asked for, so theirs are taken now
    spread = [
        value.pieces() if isinstance(value, PendingTensor) else _spread(value, grid)
        for value in values
    ]
    results = [
        Deferred(_Call(func, [patches[patch] for patches in spread], structure))
        for patch in range(len(grid.spans))
    ]
    device = arriving[0].device
    if not isinstance(like, list | tuple):
        return PendingTensor(results, grid, like, device, is_cut=func in CUTS)
    parts = range(len(wholes))
    return [
        PendingTensor(
            [Deferred(_Item(result, part)) for result in results],
            grid,
            wholes[part],
            device,
            is_cut=True,
        )
        for part in parts
    ]


class _Call:
    """An operator on one patch of each of its operands."""

    def __init__(self, func: Any, operands: list[Deferred], structure: Any) -> None:
        self._func, self._operands, self._structure = func, operands, structure

    def __call__(self) -> Any:
        args, kwargs = tree_unflatten(
            [operand.get() for operand in self._operands], self._structure
        )
        return self._func(*args, **kwargs)


class _Item:
    """One of several results."""

    def __init__(self, results: Deferred, index: int) -> None:
        self._results, self._index = results, index

    def __call__(self) -> Tensor:
        return self._results.get()[self._index]


def _has_patches(value: Any, grid: PatchGrid) -> bool:
    """Whether an operand is the same for all patches, or can be cut into them."""
    if isinstance(value, PendingTensor):
        return value.grid == grid
    return not isinstance(value, Tensor) or value.dim() == 0 or grid.fits(value)


def _spread(value: Any, grid: PatchGrid) -> list[Deferred]:
    patches = range(len(grid.spans))
    if not isinstance(value, Tensor) or value.dim() == 0:
        return [_ready(value)] * len(patches)
    return [_ready(grid.take(value, patch)) for patch in patches]


def _dim(func: Any, call: Any) -> int:
    """Along which dimension an operator cuts or joins."""
    args, kwargs = call
    place = 1 if func is aten.cat.default else 2
    return args[place] if len(args) > place else kwargs.get("dim", 0)


def _ready(value: Any) -> Deferred:
    return Deferred(lambda: value)


def _plain(value: Any) -> Any:
    return value.whole() if isinstance(value, PendingTensor) else value


def _meta(value: Any) -> Any:
    """Of the same shape and dtype, without memory. A number may stay where torch lets it meet any
    device: on the CPU.
    """
    if not isinstance(value, Tensor) or (value.dim() == 0 and value.device.type == "cpu"):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
