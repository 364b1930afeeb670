"""A prediction whose patches are still under way, and the arithmetic of a pipeline on it, patch by
patch.

Guidance and most schedulers work pixel by pixel, so the first patch of the next latents is known as
soon as the first patch of this prediction has arrived. A `PendingTensor` stands for the whole
tensor in the pipeline's unchanged loop. Arithmetic on it is recorded for each patch, and done when
that patch is needed. Any other operation waits for all patches and continues with a plain tensor.

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
"""Operators whose result at a pixel depends on that pixel only, if they cut or join along another
dimension.
"""
CUTS = frozenset({aten.split.Tensor, aten.detach.default})
"""Operators among them whose results are views of their input."""


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Where the patches of an image are."""

    spans: tuple[Span, ...]
    """Image tokens of each patch."""
    side: int | None
    """Pixels of a token's side: tensors are maps (B, C, H, W) with the tokens in rows. None:
    tensors are (B, N, C) of tokens.
    """
    width: int
    """Tokens in a row."""

    @classmethod
    def of(cls, latents: Tensor, spans: Sequence[Span], patch_size: int) -> "PatchGrid | None":
        """Return the grid of a denoiser's input; None if its tokens are not those of the spans."""
        is_map = latents.dim() == 4
        grid = cls(
            tuple(spans),
            patch_size if is_map else None,
            latents.shape[-1] // patch_size if is_map else 0,
        )
        return grid if grid.fits(latents) else None

    def fits(self, tensor: Tensor) -> bool:
        """Return whether this is a tensor of the whole image."""
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
        """Return the dimensions in which a tensor can be cut or joined patch by patch."""
        return (0, 2) if self.side is None else (0, 1)

    def take(self, tensor: Tensor, patch: int) -> Tensor:
        """Return a copy of a patch: (B, n, C), or (B, C, n, side, side)."""
        if self.side is None:
            return tensor[:, slice(*self.spans[patch])].clone()
        return self._tokens(tensor)[(slice(None), slice(None), *self._cells(patch, tensor.device))]

    def put(self, tensor: Tensor, patch: int, piece: Tensor) -> None:
        """Write a patch into a whole tensor."""
        if self.side is None:
            tensor[:, slice(*self.spans[patch])] = piece
        else:
            self._tokens(tensor)[(slice(None), slice(None), *self._cells(patch, tensor.device))] = (
                piece
            )

    def piece_shape(self, whole: torch.Size, patch: int) -> tuple[int, ...]:
        """Return the shape of a patch of a tensor with shape `whole`."""
        count = self.spans[patch][1] - self.spans[patch][0]
        return (
            (whole[0], count, whole[2])
            if self.side is None
            else (whole[0], whole[1], count, self.side, self.side)
        )

    def _tokens(self, tensor: Tensor) -> Tensor:
        """Return (B, C, H, W) as (B, C, rows, columns, side, side), in the same memory."""
        assert self.side is not None
        return tensor.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side)).transpose(3, 4)

    def _cells(self, patch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(*self.spans[patch], device=device)
        return tokens // self.width, tokens % self.width


class Deferred:
    """A value that is computed when it is first needed, and kept."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def get(self) -> Any:
        """Return the value."""
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


class PendingTensor(Tensor):
    """A tensor of which each patch is a `Deferred`. `shape`, `dtype` and `device` are those of the
    whole.
    """

    grid: PatchGrid
    gathered: "PendingTensor | None"
    """Both halves of guidance, if this is one half and the other half's patches are under way to
    this rank too: the result of `all_gather`.
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
        """like: has the whole's shape and dtype, on any device. is_cut: torch would make this a
        view of the tensor that it was cut from.
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
        """Return the plain tensor of the whole, with zeros where no patch has been filled in."""
        if self._buffer is None:
            self._buffer = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self._buffer

    @property
    def is_whole(self) -> bool:
        """Return whether all patches have been filled in."""
        return len(self._filled) == len(self.grid.spans)

    def fill(self, patch: int) -> None:
        """Wait for a patch and write it into the buffer."""
        if patch not in self._filled:
            self.grid.put(self.buffer, patch, self._pieces[patch].get())
            self._filled.add(patch)

    def whole(self) -> Tensor:
        """Wait for all patches. Return the plain tensor, which is this one's memory from now on."""
        for patch in range(len(self.grid.spans)):
            self.fill(patch)
        return self.buffer

    def pieces(self) -> list[Deferred]:
        """Return the patches of this tensor as it is now."""
        if not self.is_whole:
            return self._pieces
        return [_ready(self.grid.take(self.buffer, patch)) for patch in range(len(self.grid.spans))]

    def numpy(self, *, force: bool = False) -> Any:
        """Wait for all patches."""
        return self.whole().numpy(force=force)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"PendingTensor({tuple(self.shape)}, {self.dtype}, {len(self._filled)} of "
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
        ):  # Tensor's own would make plain results PendingTensors again
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
                f"{func} would change a part of a prediction in place, but not the whole. Clone "
                "the part first."
            )
        args, kwargs = tree_map(_plain, call)
        result = func(*args, **kwargs)
        return result if changed is None else changed


def _by_patch(func: Any, call: Any) -> Any:
    """Record the call for each patch. Return None if that is impossible, or if all patches have
    arrived anyway.
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
    # plain operands may change before a patch is needed, so their patches are copied now
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
    """Return whether an operand is the same for all patches or can be cut into them."""
    if isinstance(value, PendingTensor):
        return value.grid == grid
    return not isinstance(value, Tensor) or value.dim() == 0 or grid.fits(value)


def _spread(value: Any, grid: PatchGrid) -> list[Deferred]:
    patches = range(len(grid.spans))
    if not isinstance(value, Tensor) or value.dim() == 0:
        return [_ready(value)] * len(patches)
    return [_ready(grid.take(value, patch)) for patch in patches]


def _dim(func: Any, call: Any) -> int:
    """Return the dimension along which an operator cuts or joins."""
    args, kwargs = call
    place = 1 if func is aten.cat.default else 2
    return args[place] if len(args) > place else kwargs.get("dim", 0)


def _ready(value: Any) -> Deferred:
    return Deferred(lambda: value)


def _plain(value: Any) -> Any:
    return value.whole() if isinstance(value, PendingTensor) else value


def _meta(value: Any) -> Any:
    """Return a tensor of the same shape and dtype without memory. A number may stay on the CPU,
    where torch combines it with any device.
    """
    if not isinstance(value, Tensor) or (value.dim() == 0 and value.device.type == "cpu"):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
