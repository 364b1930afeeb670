"""Messages between the ranks of the segment axis, in the background. Sent tensors are kept alive
until they have left, and received ones are awaited where they are used.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backends.groups.mesh import Axis, Mesh
from backends.groups.objects import broadcast_object


class Arrival:
    """A tensor that is here or under way."""

    def __init__(self, tensor: Tensor, work: Any = None, traffic: Any = None) -> None:
        self._tensor = tensor
        self._work = work
        self._traffic = traffic

    def wait(self) -> Tensor:
        """Return the tensor once it is complete."""
        if self._work is not None:
            started = time.perf_counter()
            self._work.wait()
            self._work = None
            self._traffic.wait_s += time.perf_counter() - started
        return self._tensor


class Exchange:
    """The messages of one generation on this rank. Between two ranks they arrive in the order in
    which they were sent.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.axis: Axis = mesh.axis("segment")
        self.device = mesh.device
        self._traffic = mesh.traffic
        self._sends: list[tuple[Any, Tensor]] = []
        self._receives: list[Arrival] = []

    def send(self, tensor: Tensor, *, to: Sequence[int]) -> None:
        """Send to these ranks of the axis, without waiting."""
        if not to:
            return
        tensor = tensor.contiguous()
        self._traffic.add(tensor, peers=len(to))
        for rank in to:
            self._sends.append(
                (dist.isend(tensor, self.axis.ranks[rank], group=self.axis.group), tensor)
            )

    def receive(self, template: Tensor, *, source: int) -> Arrival:
        """Post a receive for a tensor like `template` (shape, dtype, device) from this rank of the
        axis, without waiting.
        """
        room = torch.empty(template.shape, dtype=template.dtype, device=template.device)
        work = dist.irecv(room, self.axis.ranks[source], group=self.axis.group)
        arrival = Arrival(room, work, self._traffic)
        self._receives.append(arrival)
        return arrival

    def broadcast(self, tensor: Tensor, *, source: int) -> Arrival:
        """Broadcast one rank's tensor in the background. The others pass a tensor of the same
        shape, whose content does not matter.
        """
        if self.axis.rank == source:
            tensor = tensor.contiguous()
            self._traffic.add(tensor, peers=self.axis.size - 1)
        else:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        work = dist.broadcast(
            tensor, src=self.axis.ranks[source], group=self.axis.group, async_op=True
        )
        arrival = Arrival(tensor, work, self._traffic)
        self._receives.append(arrival)
        return arrival

    def share(self, value: Any, *, source: int) -> Any:
        """Return one rank's small Python value on all ranks. Blocks until it has arrived, but never
        for the device.
        """
        return broadcast_object(value, source=self.axis.ranks[source], group=self.axis.object_group)

    def settle(self) -> None:
        """Wait for everything that is under way. All ranks have made the same evaluations, so every
        message has a partner.
        """
        for arrival in self._receives:
            arrival.wait()
        self._receives.clear()
        self.forget_sent()

    def forget_sent(self) -> None:
        """Release what was sent one evaluation ago: its receiver has had a whole evaluation to take
        it.
        """
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
