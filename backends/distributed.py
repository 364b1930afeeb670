"""Process groups and thin collectives: the only shared file that imports torch.distributed.

There are two kinds of groups. The control group is torch's default group: gloo on every machine, waits of any length, and carries only
commands and outcomes. A Mesh holds the data groups of a plan (NCCL on CUDA, gloo on CPU); it can be destroyed and rebuilt in
milliseconds after a failure, without touching the control group or reloading weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backends.plan import ParallelPlan

logger = logging.getLogger(__name__)

IDLE_TIMEOUT = timedelta(days=3650)
"""Followers wait in a broadcast until somebody asks for a picture, and nobody may for weeks. A dead peer is noticed by its closed
connection and a hanging one by the watch in hosts/control.py, so this wait needs no end."""


def select_device(local_rank: int) -> torch.device:
    """The device of this rank: its own CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def initialize(*, rank: int, world_size: int, store: dist.Store | None = None) -> None:
    """Open the control group. With no store the rendezvous is torchelastic's (env://)."""
    where: dict[str, Any] = {"store": store} if store is not None else {"init_method": "env://"}
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=IDLE_TIMEOUT, **where)


def shutdown() -> None:
    """Close whatever is open. Peers that still wait see a closed connection."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(slots=True)
class Traffic:
    """What the data groups of this rank carried since the last reset."""

    sent_bytes: int = 0
    messages: int = 0
    wait_s: float = 0.0

    def reset(self) -> None:
        self.sent_bytes, self.messages, self.wait_s = 0, 0, 0.0

    def add(self, *tensors: Tensor, peers: int = 1) -> None:
        """Count one message of these tensors, sent to `peers` other ranks."""
        self.messages += 1
        self.sent_bytes += peers * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """This rank's place along one axis of the mesh (or several, flattened). `group` is None exactly when size is 1."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        return len(self.ranks)


class Mesh:
    """The data groups of a plan on this rank. Every rank must build, use and rebuild its mesh in the same order."""

    def __init__(self, plan: ParallelPlan, *, rank: int, device: torch.device) -> None:
        self.plan = plan
        self.rank = rank
        self.device = device
        self.traffic = Traffic()
        self._axes: dict[tuple[str, ...], Axis] = {}
        self._open_groups: list[dist.ProcessGroup] = []
        self._step_group: dist.ProcessGroup | None = None
        self._open()

    def axis(self, *names: str) -> Axis:
        """One axis, or several flattened into one (outermost first). The first use of a combination is collective."""
        key = tuple(sorted(names))
        if key not in self._axes:
            self._axes[key] = self._make_axis(names)
        return self._axes[key]

    def broadcast_word(self, word: int) -> int:
        """Rank 0's word to all ranks, on a CPU group of its own: once per denoising step (go on, or cancel)."""
        if self._step_group is None:
            return word
        message = torch.tensor([word], dtype=torch.int64)
        dist.broadcast(message, src=0, group=self._step_group)
        return int(message.item())

    def destroy(self) -> None:
        """Close the data groups. Peers that wait in one of them fail at once (gloo: connection closed by peer)."""
        for group in self._open_groups:
            try:
                if self.device.type == "cuda":
                    group.abort()  # a rank that waits inside a CUDA kernel is not woken by a closed socket
                dist.destroy_process_group(group)
            except (RuntimeError, ValueError) as error:
                logger.warning("closing a data group failed: %s", error)
        self._open_groups.clear()
        self._axes = {key: _without_group(axis) for key, axis in self._axes.items()}
        self._step_group = None

    def rebuild(self) -> None:
        """Close and open all data groups again, on all ranks; axes handed out before are replaced (ask again with `axis`)."""
        wanted = list(self._axes)
        self.destroy()
        self._axes.clear()
        self._open()
        for names in wanted:
            self.axis(*names)

    def _open(self) -> None:
        if self.plan.world_size > 1:
            self._step_group = self._new_group(range(self.plan.world_size), backend="gloo")
        for name, _ in self.plan.axes:
            self.axis(name)

    def _make_axis(self, names: Sequence[str]) -> Axis:
        mine = self.plan.ranks(*names, of_rank=self.rank)
        group = None
        if len(mine) > 1:
            # torch wants every rank to take part in the making of every group, its own or not
            for ranks in sorted({self.plan.ranks(*names, of_rank=rank) for rank in range(self.plan.world_size)}):
                made = self._new_group(ranks, backend="nccl" if self.device.type == "cuda" else "gloo")
                group = made if self.rank in ranks else group
        return Axis(name="x".join(names), ranks=mine, rank=mine.index(self.rank), group=group)

    def _new_group(self, ranks: Sequence[int], *, backend: str) -> dist.ProcessGroup:
        group = dist.new_group(list(ranks), backend=backend)
        if self.rank in ranks:
            self._open_groups.append(group)
        return group


def _without_group(axis: Axis) -> Axis:
    return Axis(name=axis.name, ranks=axis.ranks, rank=axis.rank, group=None)


def all_gather(tensor: Tensor, *, dim: int, axis: Axis) -> Tensor:
    """Concatenate equal shards along `dim` in rank order. Blocks until every rank of the axis has sent its shard."""
    if axis.group is None:
        return tensor
    tensor = tensor.contiguous()
    shards = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(shards, tensor, group=axis.group)
    return torch.cat(shards, dim=dim)


def broadcast_command(command: object) -> object:
    """Rank 0's command to every rank over the control group; followers pass anything and get rank 0's."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return command
    box = [command]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_outcomes(outcome: object) -> list[Any]:
    """Every rank's outcome, in rank order, on every rank, over the control group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes
