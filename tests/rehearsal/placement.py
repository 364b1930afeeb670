"""On which device an operator runs, whether CUDA would refuse it, and whether the host waits for
the device because of it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.rehearsal.tensors import PLAIN_DATA, CudaTensor, WouldFail

if TYPE_CHECKING:
    from tests.rehearsal.rehearsal import Rehearsal

aten = torch.ops.aten
CPU = torch.device("cpu")
READS = {
    aten._local_scalar_dense.default: "item()",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "bool()",
}
SIZE_DEPENDS_ON_VALUES = frozenset(
    {
        aten.nonzero.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.unique_consecutive.default,
        aten.unique_dim.default,
        aten.bincount.default,
    }
)
"""The host must know how large the result is."""
INDEXING = frozenset(
    {
        aten.index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
        aten._unsafe_index.Tensor,
        aten._unsafe_index_put.default,
    }
)
"""The tensor that is indexed decides on the device; indices may be on the CPU."""
SUMS_OF_HALVES = (aten._softmax.default, aten._log_softmax.default)
"""Of float16 with a result in float32, which only CUDA's kernels do in one."""


class Placement:
    """Runs operators for one process."""

    def __init__(self, rehearsal: "Rehearsal") -> None:
        self._rehearsal = rehearsal
        self._kernels = {
            aten._scaled_dot_product_flash_attention.default: self._flash_attention,
            aten._scaled_dot_product_efficient_attention.default: _efficient_attention,
            **{operator: _in_float32(operator) for operator in SUMS_OF_HALVES},
        }

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator's result, on a GPU where an operand or `device` is. WouldFail for what CUDA
        refuses.
        """
        values, structure = tree_flatten((args, kwargs))
        tensors = [value for value in values if isinstance(value, Tensor)]
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not any(isinstance(value, CudaTensor) for value in tensors) and (
            wanted is None or wanted.type != "cuda"
        ):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._to_copy(args[0], kwargs, wanted)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        self._note_waits(func, args, kwargs)
        device = self._device(func, args, tensors, wanted)
        args, kwargs = tree_unflatten([_plain(value) for value in values], structure)
        kwargs = {name: False if name == "pin_memory" else value for name, value in kwargs.items()}
        result = self._kernels.get(func, func)(*args, **kwargs)
        return _wrapped(
            result,
            {id(value.inner): value for value in tensors if isinstance(value, CudaTensor)},
            device,
        )

    def with_index(self, device: torch.device) -> torch.device:
        """'cuda' is the current GPU. WouldFail for one that is not there."""
        if device.type != "cuda":
            return device
        index = self._rehearsal.index if device.index is None or device.index < 0 else device.index
        if index >= self._rehearsal.num_devices:
            raise WouldFail(f"CUDA error: invalid device ordinal (cuda:{index})")
        return torch.device("cuda", index)

    def _note_waits(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if func in READS:
            self._rehearsal.host_waits(READS[func])
        if func in SIZE_DEPENDS_ON_VALUES:
            self._rehearsal.host_waits(func.__name__)
        driver = kwargs.get("driver") or (args[3] if len(args) > 3 else None)
        if func is aten.linalg_lstsq.default and driver not in (None, "gels"):
            raise WouldFail(
                f"torch.linalg.lstsq: parameter `driver` should be one of (gels), not {driver}, on "
                "CUDA"
            )

    def _device(
        self, func: Any, args: Any, tensors: list[Tensor], wanted: torch.device | None
    ) -> torch.device:
        """Of the result: all operands', but for CPU scalars."""
        if func in INDEXING:
            tensors = self._without_indices(args, tensors)
        if wanted is not None:
            return self.with_index(wanted)
        found = {
            value.device for value in tensors if isinstance(value, CudaTensor) or value.dim() > 0
        }
        if len(found) > 1:
            names = " and ".join(sorted(map(str, found)))
            raise WouldFail(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{names}! (in {func})"
            )
        return next(value.device for value in tensors if isinstance(value, CudaTensor))

    def _without_indices(self, args: Any, tensors: list[Tensor]) -> list[Tensor]:
        base = args[0]
        indices = [value for value in tree_flatten(args[1])[0] if isinstance(value, Tensor)]
        for index in indices:
            if isinstance(index, CudaTensor) and not isinstance(base, CudaTensor):
                raise WouldFail(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu)"
                )
            if index.dtype == torch.bool:
                self._rehearsal.host_waits("boolean index")
            elif not isinstance(index, CudaTensor) and index.dim() > 0:
                self._rehearsal.host_waits("index from the CPU")
        return [
            value
            for value in tensors
            if value is base or all(value is not index for index in indices)
        ]

    def _to_copy(
        self, source: Tensor, kwargs: dict[str, Any], wanted: torch.device | None
    ) -> Tensor:
        target = source.device if wanted is None else self.with_index(wanted)
        self._note_copy(source.device, target, is_async=bool(kwargs.get("non_blocking")))
        options = {
            name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")
        }
        made = aten._to_copy.default(_plain(source), **options, device=_plain(target))
        return CudaTensor(made, target) if target.type == "cuda" else made

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        self._note_copy(source.device, target.device, is_async=non_blocking)
        aten.copy_.default(_plain(target), _plain(source))
        return target

    def _note_copy(self, source: torch.device, target: torch.device, *, is_async: bool) -> None:
        if source == target or "meta" in (source.type, target.type):
            return
        if target.type == "cpu":
            self._rehearsal.host_waits("copy to the CPU")
        elif source.type == "cuda":
            self._rehearsal.copied_between_gpus(source, target)
        elif not is_async:
            self._rehearsal.host_waits("copy from the CPU")

    def _flash_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        scale: float | None = None,
        **_: Any,
    ) -> Any:
        if (
            query.dtype not in (torch.float16, torch.bfloat16)
            or query.shape[-1] % 8
            or query.shape[-1] > 256
        ):
            raise WouldFail(
                "FlashAttention takes half precision and heads of multiples of 8 up to 256, not "
                f"{query.dtype}, {query.shape[-1]}"
            )
        if self._rehearsal.capability < (8, 0):
            raise WouldFail("FlashAttention only supports Ampere GPUs or newer.")
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            query, key, value, scale=scale
        )
        return (
            output,
            lse,
            None,
            None,
            query.shape[2],
            key.shape[2],
            torch.zeros(2),
            torch.zeros(0),
            torch.zeros(0),
        )


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *rest: Any,
    scale: float | None = None,
    **_: Any,
) -> Any:
    """CUDA's kernel pads the rows of the log-sum-exp to multiples of 32, and wants rows of a bias
    at multiples of 16 bytes.
    """
    if bias is not None and any(
        bias.stride(dim) * bias.element_size() % 16 for dim in range(bias.dim() - 1)
    ):
        raise WouldFail(f"attn_bias is not correctly aligned: strides {bias.stride()}")
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, attn_mask=bias, scale=scale
    )
    return (
        output,
        torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")),
        torch.zeros(()),
        torch.zeros(()),
    )


def _in_float32(operator: Any) -> Any:
    def run(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        return operator(x.float() if half_to_float else x, dim, False)

    return run


def _plain(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.inner
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _wrapped(result: Any, owners: dict[int, CudaTensor], device: torch.device) -> Any:
    """owners: by id of their inner tensor; an operator in place returns one of these."""

    def wrap(value: Tensor) -> Tensor:
        if is_foreign(type(value)):
            return value
        owner = owners.get(id(value))
        if owner is None:
            return CudaTensor(value, device)
        if owner.shape != value.shape or owner.stride() != value.stride():
            PLAIN_DATA.__set__(owner, CudaTensor(value, device))
        return owner

    return tree_map_only(Tensor, wrap, result)


def is_foreign(kind: type) -> bool:
    """Whether a tensor class has operators of its own (PipeFusion's pending predictions)."""
    return (
        not issubclass(kind, CudaTensor)
        and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    )
