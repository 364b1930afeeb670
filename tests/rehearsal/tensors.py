"""CudaTensor: a CPU tensor that says it is on a GPU. Every operator on it goes through
placement.py.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tests.rehearsal.rehearsal import Rehearsal

PLAIN_DATA = torch._C.TensorBase.data
PLAIN_SUBCLASS = Tensor._make_subclass
OWN_ATTRIBUTES = ("inner", "_is_param")


class WouldFail(RuntimeError):
    """torch would raise this on a machine with GPUs."""


class CudaTensor(Tensor):
    """A wrapper around `inner`, which is on the CPU and holds the numbers. rehearsal: of this
    process.
    """

    inner: Tensor
    rehearsal: ClassVar["Rehearsal"]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        inner: Tensor,
        device: torch.device | None = None,
        requires_grad: bool = False,
        **_: Any,
    ) -> Tensor:
        if device is None:  # accelerate builds a parameter by the class of the one that it replaces
            return nn.Parameter(inner, requires_grad=requires_grad)
        layout = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
        }
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.rehearsal.execute(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if isinstance(new, CudaTensor):
            PLAIN_DATA.__set__(self, new)
            self.inner = new.inner
        else:
            become(self, new)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first."
            )
        return self.cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        self.rehearsal.host_waits("tolist()")
        return self.inner.tolist()

    def new_tensor(
        self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
    ) -> Tensor:
        return torch.tensor(
            data, dtype=dtype or self.dtype, device=self.device if device is None else device
        )

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None: ...

    def cuda(self, device: Any = None, **_: Any) -> Tensor:
        return self.to(torch.device("cuda") if device is None else device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self.device}, {self.inner!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickled tensor keeps its device, and comes back there in whatever process reads it:
        torch does the same.
        """
        self.rehearsal.host_waits("pickle")
        return CudaTensor, (self.inner, self.device)

    def __deepcopy__(self, memo: Any) -> Tensor:
        made: Tensor = CudaTensor(self.inner.clone(), self.device)
        if getattr(self, "_is_param", False):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made


def become(tensor: Tensor, new: Tensor) -> None:
    """`tensor.data = new` between a plain tensor and one on a GPU: the object stays, its class and
    content change.
    """
    other = CudaTensor(new.inner, new.device) if isinstance(new, CudaTensor) else new.detach()
    is_of_a_library = type(tensor) not in (Tensor, nn.Parameter, CudaTensor)
    if isinstance(new, CudaTensor) and is_of_a_library and not isinstance(tensor, CudaTensor):
        other = SUBCLASSES.make(type(tensor), new)
    elif isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, requires_grad=tensor.requires_grad)
    other.__dict__.update(
        {name: value for name, value in tensor.__dict__.items() if name not in OWN_ATTRIBUTES}
    )
    torch.utils.swap_tensors(tensor, other)


def set_data(tensor: Tensor, new: Tensor) -> None:
    """For plain tensors, in the place of the setter of Tensor.data."""
    if isinstance(new, CudaTensor) and not isinstance(tensor, CudaTensor):
        become(tensor, new)
    else:
        PLAIN_DATA.__set__(tensor, new)


class Subclasses:
    """Libraries' tensor classes (GGUF's parameters) around a CudaTensor: of both classes."""

    def __init__(self) -> None:
        self._mixed: dict[type, type] = {}

    def make(self, cls: type, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        """In the place of Tensor._make_subclass."""
        if not isinstance(data, CudaTensor):
            plain = cls.__bases__[0] if issubclass(cls, CudaTensor) else cls
            return PLAIN_SUBCLASS(plain, data, requires_grad, **kwargs)
        if cls is Tensor:
            return CudaTensor(data.inner, data.device)
        mixed = cls if issubclass(cls, CudaTensor) else self._of(cls)
        made = CudaTensor.__new__(mixed, data.inner, data.device)
        made._is_param = True
        return made

    def _of(self, cls: type) -> type:
        if cls not in self._mixed:
            self._mixed[cls] = type(f"{cls.__name__}OnCuda", (cls, CudaTensor), {})
        return self._mixed[cls]


SUBCLASSES = Subclasses()


def read_scalars(data: Any) -> Any:
    """torch.tensor([0-dim tensors on a GPU]) reads them one by one, below the level at which a
    wrapper could answer.
    """
    if isinstance(data, list | tuple) and any(
        isinstance(value, CudaTensor) and value.dim() == 0 for value in data
    ):
        return [value.item() if isinstance(value, CudaTensor) else value for value in data]
    return data


def new_plain(cls: type, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of Tensor.__new__, for torch.Tensor([...])."""
    if cls is Tensor and args:
        args = (read_scalars(args[0]), *args[1:])
    return torch._C.TensorBase.__new__(cls, *args, **kwargs)
