"""NCCL groups of the rehearsal: gloo groups that refuse what NCCL refuses, and whose lost peers are
kernels that never end.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from tests.rehearsal.gpus import Replacement
from tests.rehearsal.journal import Operation, Wait, place
from tests.rehearsal.order import communicators
from tests.rehearsal.tensors import CudaTensor, WouldFail

if TYPE_CHECKING:
    from tests.rehearsal.rehearsal import Rehearsal

REAL = {
    name: getattr(c10d, name)
    for name in (
        "new_group all_gather all_gather_single all_reduce broadcast all_to_all_single isend "
        "irecv batch_isend_irecv destroy_process_group "
        "is_nccl_available _get_object_coll_device"
    ).split()
}
GLOO_TIMEOUT = timedelta(seconds=60)
"""A lost peer is noticed by its closed connection; this is for faults of the rehearsal."""
REAL_ABORT = dist.ProcessGroup.abort


class Groups:
    """torch.distributed for one rank: NCCL groups are rehearsed, others are left alone."""

    def __init__(self, rehearsal: "Rehearsal") -> None:
        self._rehearsal = rehearsal
        self._nccl: dict[Any, tuple[str, tuple[int, ...]]] = {}
        self._aborted: set[int] = set()
        self._num_operations = 0
        self.limits: list[timedelta | None] = []
        """Of the NCCL groups that were made."""

    def replacements(self) -> Iterator[Replacement]:
        ours = {
            **{name: getattr(self, name) for name in REAL if hasattr(self, name)},
            "is_nccl_available": lambda: True,
        }
        for name, function in ours.items():
            yield c10d, name, function
            yield dist, name, function
        yield c10d, "_get_object_coll_device", self._device_of_objects
        yield dist.ProcessGroup, "abort", lambda group: self._abort(group)

    @property
    def num_communicators(self) -> int:
        if not self._nccl:  # a process without ranks has none, and no rank to ask for
            return 0
        open_groups = {name for name, _ in self._nccl.values()}
        used = communicators(self._rehearsal.journal.entries, dist.get_rank())
        return sum(communicator.group in open_groups for communicator in used)

    # what torch.distributed has

    def new_group(
        self, ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any
    ) -> Any:
        if backend == "nccl":
            self.limits.append(timeout)
            timeout = GLOO_TIMEOUT  # NCCL's never comes in a test
        made = REAL["new_group"](ranks, timeout, "gloo" if backend == "nccl" else backend, **kwargs)
        if backend == "nccl" and made is not c10d.GroupMember.NON_GROUP_MEMBER:
            self._aborted.discard(id(made))  # that of a group which is gone
            self._nccl[made] = (
                made.group_name,
                tuple(ranks if ranks is not None else range(dist.get_world_size())),
            )
        return made

    def destroy_process_group(self, group: Any = None) -> None:
        self._nccl.pop(group, None)
        REAL["destroy_process_group"](group)

    def all_gather(
        self, tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        parts, own = [self._plain(part, group) for part in tensor_list], self._plain(tensor, group)
        return self._collective(
            "all_gather",
            tensor,
            group,
            lambda: REAL["all_gather"](parts, own, group, async_op),
            async_op,
        )

    def all_gather_single(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        whole, own = self._plain(output_tensor, group), self._plain(input_tensor, group)
        run = partial(REAL["all_gather_single"], whole, own, group, async_op)
        return self._collective("all_gather_into", input_tensor, group, run, async_op)

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        own = self._plain(tensor, group)
        return self._collective(
            "all_reduce",
            tensor,
            group,
            lambda: REAL["all_reduce"](own, op, group, async_op),
            async_op,
        )

    def broadcast(
        self,
        tensor: Tensor,
        src: Any = None,
        group: Any = None,
        async_op: bool = False,
        group_src: Any = None,
    ) -> Any:
        own = self._plain(tensor, group)
        where = {"src": src, "group": group, "group_src": group_src}
        run = partial(REAL["broadcast"], own, async_op=async_op, **where)
        return self._collective("broadcast", tensor, group, run, async_op, source=src)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        to, of = self._plain(output, group), self._plain(input, group)
        arguments = (to, of, output_split_sizes, input_split_sizes, group, async_op)
        run = partial(REAL["all_to_all_single"], *arguments)
        sizes = {
            "received": tuple(output_split_sizes or ()),
            "sent": tuple(input_split_sizes or ()),
        }
        return self._collective("all_to_all", input, group, run, async_op, **sizes)

    def isend(
        self,
        tensor: Tensor,
        dst: Any = None,
        group: Any = None,
        tag: int = 0,
        group_dst: Any = None,
    ) -> Any:
        own = self._plain(tensor, group)
        return self._message(
            "send", tensor, dst, group, lambda: REAL["isend"](own, dst, group, tag, group_dst)
        )

    def irecv(
        self,
        tensor: Tensor,
        src: Any = None,
        group: Any = None,
        tag: int = 0,
        group_src: Any = None,
    ) -> Any:
        own = self._plain(tensor, group)
        return self._message(
            "recv", tensor, src, group, lambda: REAL["irecv"](own, src, group, tag, group_src)
        )

    def batch_isend_irecv(self, operations: list[Any]) -> list[Any]:
        group = operations[0].group
        if group not in self._nccl:
            return REAL["batch_isend_irecv"](operations)
        kinds = ["send" if operation.op == self.isend else "recv" for operation in operations]
        messages = tuple(
            (kind, each.peer, each.tensor.numel())
            for kind, each in zip(kinds, operations, strict=True)
        )
        number = self._note("batch", group, operations[0].tensor, messages=messages)
        calls = [
            (REAL[f"i{kind}"], self._plain(each.tensor, group), each.peer)
            for kind, each in zip(kinds, operations, strict=True)
        ]
        works = self._finish(
            lambda: [call(tensor, peer, group) for call, tensor, peer in calls], group
        )
        return [_Work(works or [], number, group, self)]

    # NCCL's rules

    def waited_for(self, number: int) -> None:
        self._rehearsal.journal.entries.append(Wait(number))

    def finish_within(self, works: Sequence[Any], group: Any, timeout: timedelta | None) -> None:
        """Work.wait: without a time-out only the stream waits; with one the host does, and aborts
        when the time is over.
        """
        if timeout is not None:
            self._rehearsal.host_waits_at_most(timeout.total_seconds(), "work.wait(timeout)")
        for work in works:
            self._finish(lambda: work.wait() if timeout is None else work.wait(timeout), group)

    def _collective(
        self,
        kind: str,
        tensor: Tensor,
        group: Any,
        run: Callable[[], Any],
        async_op: bool,
        **facts: Any,
    ) -> Any:
        if group not in self._nccl:
            return run()
        number = self._note(kind, group, tensor, **facts)
        work = self._finish(run, group)
        if async_op:
            return _Work([work] if work is not None else [], number, group, self)
        self.waited_for(number)
        return None

    def _message(
        self, kind: str, tensor: Tensor, peer: int, group: Any, run: Callable[[], Any]
    ) -> Any:
        if group not in self._nccl:
            return run()
        number = self._note(kind, group, tensor, peer=peer)
        work = self._finish(run, group)
        return _Work([work] if work is not None else [], number, group, self)

    def _plain(self, tensor: Tensor, group: Any) -> Tensor:
        """What gloo can send. WouldFail for a tensor that does not belong into this group."""
        if group not in self._nccl:
            if isinstance(tensor, CudaTensor):
                raise WouldFail("a CUDA tensor was given to a gloo group")
            return tensor
        if not isinstance(tensor, CudaTensor):
            raise WouldFail(
                "No backend type associated with device type cpu: a CPU tensor was given to an "
                "NCCL group"
            )
        if tensor.device.index != self._rehearsal.index:
            raise WouldFail(
                f"this rank's device is cuda:{self._rehearsal.index}, but NCCL was given a tensor "
                f"on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise WouldFail("Tensors must be contiguous")
        return tensor.inner

    def _note(self, kind: str, group: Any, tensor: Tensor, **facts: Any) -> int:
        if id(group) in self._aborted:
            raise RuntimeError("NCCL communicator was aborted on this rank")
        self._num_operations += 1
        name, ranks = self._nccl[group]
        journal = self._rehearsal.journal
        what = {"elements": tensor.numel(), "dtype": str(tensor.dtype), "where": place()}
        what["step"] = journal.step
        operation = Operation(
            number=self._num_operations, kind=kind, group=name, ranks=ranks, **what, **facts
        )
        journal.entries.append(operation)
        if self._rehearsal.has_dead_links:
            self._rehearsal.get_stuck(f"{kind} on {name}", group)
        return self._num_operations

    def _finish(self, call: Callable[[], Any], group: Any) -> Any:
        """Do what waits for peers. A lost peer leaves a kernel running, and nothing tells the
        host.
        """
        if self._rehearsal.stuck_behind is not None or id(group) in self._aborted:
            return None  # it is queued behind that kernel, or has been ended
        try:
            with torch._C.DisableTorchFunction():  # modes of the program have seen the call already
                return call()
        except RuntimeError as error:
            if id(group) in self._aborted:
                return None
            self._rehearsal.get_stuck(
                f"{self._nccl.get(group, ('a group',))[0]} ({str(error)[:80]}), begun at {place()}",
                group,
            )
            return None

    def _abort(self, group: Any) -> None:
        if group not in self._nccl:
            REAL_ABORT(group)
            return
        self._aborted.add(id(group))
        self._rehearsal.abort(group)
        REAL_ABORT(group)

    def _device_of_objects(self, group: Any = None) -> Any:
        return (
            f"cuda:{self._rehearsal.index}"
            if group in self._nccl
            else REAL["_get_object_coll_device"](group)
        )


class _Work:
    """What an operation in the background returns."""

    def __init__(self, works: Sequence[Any], number: int, group: Any, groups: Groups) -> None:
        self._works, self._number, self._group, self._groups = list(works), number, group, groups

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._groups.waited_for(self._number)
        self._groups.finish_within(self._works, self._group, timeout)
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)
