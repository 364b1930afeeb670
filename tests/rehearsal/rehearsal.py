"""Rehearsal: within it this process sees GPUs.

    with Rehearsal(num_devices=2, index=rank) as rehearsal:
        ...  # the program, with device torch.device("cuda", rank)
    rehearsal.journal  # where the host waited, and what went over which group

Begin it before the program touches torch.cuda, in the main thread.
"""

import ctypes
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.utils._device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rehearsal import gpus
from tests.rehearsal.groups import Groups
from tests.rehearsal.journal import Journal, place
from tests.rehearsal.placement import Placement, is_foreign
from tests.rehearsal.tensors import (
    PLAIN_DATA,
    SUBCLASSES,
    CudaTensor,
    new_plain,
    read_scalars,
    set_data,
)

ABSENT = object()
CUDA_TYPE, META_TYPE, NUM_TYPES = 1, 14, 21
"""Of c10::DeviceType."""
REMEMBERS_DEVICES = (
    "diffusers.utils.torch_utils",
    "accelerate.utils.imports",
    "transformers.utils.import_utils",
)
LOOK_EVERY_S = 0.02


class WouldHang(BaseException):
    """The host would wait for a kernel that never ends. No `except Exception` of the program takes
    it.
    """


class _Mode(TorchDispatchMode):
    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self._placement = placement

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if is_foreign(
                kind
            ):  # the program's own class decides, and what it does comes back here
                with self:
                    return kind.__torch_dispatch__(func, types, args, kwargs or {})
        return self._placement.execute(func, args, kwargs or {})


class Rehearsal:
    """One process's. stuck_behind: the kernel that never ends, if there is one."""

    def __init__(
        self,
        *,
        num_devices: int = 1,
        index: int = 0,
        capability: tuple[int, int] = (9, 0),
        hang_s: float = 5.0,
        has_dead_links: bool = False,
    ) -> None:
        """index: of this process's GPU. hang_s: after so long a host that hangs ends with
        WouldHang.

        has_dead_links: every NCCL kernel hangs, as on boards whose peer-to-peer access does not
        work.
        """
        self.num_devices, self.index, self.capability = num_devices, index, capability
        self.has_dead_links = has_dead_links
        self.journal = Journal()
        self.placement = Placement(self)
        self.stuck_behind: str | None = None
        self._stuck_group: Any = None
        self._hang_s = hang_s
        self.groups = Groups(self)
        self._replaced: list[tuple[Any, str, Any]] = []
        self._mode = _Mode(self.placement)

    def __enter__(self) -> Self:
        import torch._dynamo  # while it still sees that there is no GPU

        CudaTensor.rehearsal = self
        _lend_device_guard()
        # is remembered, and must hold torch's own functions
        torch.utils._device._device_constructors()
        torch._C._set_only_lift_cpu_tensors(True)
        for replacements in (gpus.replacements(self), self.groups.replacements(), _of_tensors()):
            for owner, name, value in replacements:
                self._replace(owner, name, value)
        _forget_devices()
        self._mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        for owner, name, value in reversed(self._replaced):
            if value is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._replaced.clear()
        torch._C._set_only_lift_cpu_tensors(False)
        _forget_devices()

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """For CudaTensor, where the mode is not on: in other threads."""
        return self.placement.execute(func, args, kwargs)

    def set_device(self, device: Any) -> None:
        self.index = device if isinstance(device, int) else torch.device(device).index

    @property
    def num_communicators(self) -> int:
        """That are open on this rank."""
        return self.groups.num_communicators

    def copied_between_gpus(self, source: torch.device, target: torch.device) -> None:
        self.journal.copies[f"{source} -> {target} at {place()}"] += 1

    # the host and the device

    def host_waits(self, kind: str, *, is_behind: bool = True) -> None:
        """is_behind: whether what it waits for was enqueued after the kernel that never ends, if
        there is one.
        """
        self.journal.host_waited(kind)
        if self.stuck_behind is not None and is_behind:
            self._hang(kind)

    def host_waits_at_most(self, seconds: float, kind: str) -> None:
        """RuntimeError after `seconds` behind a kernel that never ends; as torch does, the kernel
        is ended by that.
        """
        self.journal.host_waited(kind)
        if self.stuck_behind is None:
            return
        self._wait_while_stuck(seconds)
        if behind := self.stuck_behind:
            self.stuck_behind = self._stuck_group = None
            raise RuntimeError(f"Work timed out in blocking wait, behind {behind}")

    def get_stuck(self, behind: str, group: Any) -> None:
        if self.stuck_behind is None:
            self.stuck_behind, self._stuck_group = behind, group

    def abort(self, group: Any) -> None:
        """Ends the kernel that hangs if it is this group's; else NCCL waits until that one is
        ended.
        """
        if self._stuck_group is group:
            self.stuck_behind = self._stuck_group = None
        elif self.stuck_behind is not None:
            self._hang("ncclCommAbort of another group")

    def _hang(self, kind: str) -> None:
        self._wait_while_stuck(self._hang_s)
        if self.stuck_behind is not None:
            raise WouldHang(
                f"the host would wait for good in {kind} at {place()}, behind {self.stuck_behind}"
            )

    def _wait_while_stuck(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.stuck_behind is not None and time.monotonic() < until:
            time.sleep(LOOK_EVERY_S)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        before = (
            vars(owner).get(name, ABSENT)
            if isinstance(owner, type)
            else getattr(owner, name, ABSENT)
        )
        self._replaced.append((owner, name, before))
        setattr(owner, name, value)


def _of_tensors() -> Any:
    tensor, fits = torch.tensor, torch._has_compatible_shallow_copy_type
    yield Tensor, "data", property(PLAIN_DATA.__get__, set_data)
    yield Tensor, "_make_subclass", staticmethod(SUBCLASSES.make)
    yield Tensor, "__new__", new_plain
    yield torch, "tensor", lambda data, **kwargs: tensor(read_scalars(data), **kwargs)

    def fits_too(one: Tensor, other: Tensor) -> bool:
        """Where not, nn.Module.to makes a new parameter: a plain one cannot become a wrapper. What
        is no parameter gets new data: diffusers puts weights of GGUF that stay in fp32 there so.
        """
        if isinstance(one, CudaTensor) != isinstance(other, CudaTensor):
            return not isinstance(one, nn.Parameter)
        return fits(one, other)

    yield torch, "_has_compatible_shallow_copy_type", fits_too


def _lend_device_guard() -> None:
    """A CPU build has no device guard for CUDA, which indexing asks for. That of `meta` does
    nothing.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * NUM_TYPES).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    guards[CUDA_TYPE] = guards[CUDA_TYPE] or guards[META_TYPE]


def _forget_devices() -> None:
    """What libraries remember of the devices that they have seen."""
    for name in REMEMBERS_DEVICES:
        for value in list(vars(sys.modules[name]).values()) if name in sys.modules else ():
            inner = (
                [getattr(each, "__func__", each) for each in vars(value).values()]
                if isinstance(value, type)
                else []
            )
            for function in (value, *inner):
                if type(function).__name__ == "_lru_cache_wrapper":
                    function.cache_clear()
