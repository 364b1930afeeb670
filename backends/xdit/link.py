"""The messages between two neighbouring stages of a pipeline, in order, sent in the background."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from backends.distributed import Mesh


class StageLink:
    """One denoiser call's way from the stage before and to the stage after. Every message is one pass's tokens.

    num_tokens: how many tokens each message has, in order. Receives are posted one message ahead, so that it travels while the one
    before is worked on; sends are kept until they are done, because gloo drops one whose handle is gone.
    """

    def __init__(self, mesh: Mesh, num_tokens: Sequence[int]) -> None:
        self._stage = mesh.axis("stage")
        self._traffic = mesh.traffic
        self._num_tokens = list(num_tokens)
        self._arriving: tuple[dist.Work, Tensor] | None = None
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, hidden: Tensor, text: Tensor | None) -> None:
        """hidden: (B, n, D); text: (B, t, D) where it runs through the blocks too."""
        message = hidden.contiguous() if text is None else torch.cat([hidden, text], dim=1)
        self._traffic.add(message)
        work = dist.isend(message, self._stage.ranks[self._stage.rank + 1], group=self._stage.group)
        self._sent.append((work, message))

    def receive(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The next message, in the shapes and dtype of this rank's own `hidden` and `text`."""
        if self._arriving is None:
            self._post(hidden)
        assert self._arriving is not None
        work, message = self._arriving
        started = time.perf_counter()
        work.wait()
        self._traffic.wait_s += time.perf_counter() - started
        self._post(hidden)
        if text is None:
            return message, None
        return message[:, : hidden.shape[1]], message[:, hidden.shape[1] :]

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        for work, _ in self._sent:
            work.wait()

    def _post(self, like: Tensor) -> None:
        """Start receiving the next message, if there is one."""
        self._arriving = None
        if self._num_tokens:
            message = like.new_empty((like.shape[0], self._num_tokens.pop(0), like.shape[2]))
            work = dist.irecv(message, self._stage.ranks[self._stage.rank - 1], group=self._stage.group)
            self._arriving = (work, message)
