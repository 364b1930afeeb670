"""Messages between the stages of a pipeline, in order and in the background: tokens to the next
stage, predictions from the last stage.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from backends.groups.mesh import Mesh
from backends.xdit.pending import Deferred


class StageLink:
    """The messages of one denoiser call from the stage before and to the stage after. Each has the
    tokens of one pass.

    num_tokens: the number of tokens of each message, in order. Each receive is posted one message
    ahead, so that the message travels while the one before is processed. Sends are kept until they
    are done, because gloo drops a send whose handle is gone.
    """

    def __init__(self, mesh: Mesh, num_tokens: Sequence[int]) -> None:
        self._stage = mesh.axis("stage")
        self._traffic = mesh.traffic
        self._num_tokens = list(num_tokens)
        self._arriving: tuple[dist.Work, Tensor] | None = None
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, hidden: Tensor, text: Tensor | None) -> None:
        """Send to the next stage. hidden: (B, n, D); text: (B, t, D) where it runs through the
        blocks too.
        """
        message = hidden.contiguous() if text is None else torch.cat([hidden, text], dim=1)
        self._traffic.add(message)
        work = dist.isend(message, self._stage.ranks[self._stage.rank + 1], group=self._stage.group)
        self._sent.append((work, message))

    def receive(self, hidden: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the next message, with the shapes and dtype of this rank's own `hidden` and
        `text`.
        """
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
        self._sent.clear()

    def _post(self, like: Tensor) -> None:
        """Start receiving the next message, if there is one."""
        self._arriving = None
        if self._num_tokens:
            message = like.new_empty((like.shape[0], self._num_tokens.pop(0), like.shape[2]))
            work = dist.irecv(
                message, self._stage.ranks[self._stage.rank - 1], group=self._stage.group
            )
            self._arriving = (work, message)


class PredictionLink:
    """The last stage's prediction for each patch of a denoiser call, sent to all other stages.

    Under a CFG split each half of guidance has its own stages. The last stage of each half then
    sends to the other stages of both halves, which need both predictions for the next step. If the
    stages requested them from each other, patch by patch, all would have to make their requests in
    the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._axis = mesh.axis("cfg", "stage")
        num_stages = mesh.axis("stage").size
        self._last = self._axis.ranks[num_stages - 1 :: num_stages]
        self._traffic = mesh.traffic
        self._under_way: list[Deferred] = []

    def send(self, piece: Tensor) -> None:
        """Send a patch of the prediction, on a last stage."""
        piece = piece.contiguous()
        others = [rank for rank in self._axis.ranks if rank not in self._last]
        self._traffic.add(piece, peers=len(others))
        for rank in others:
            self._add(dist.isend(piece, rank, group=self._axis.reverse_group), piece)

    def receive(self, shape: Sequence[int], like: Tensor) -> list[Deferred]:
        """Start receiving the next patch from each last stage, in the order of the halves, on any
        other stage. shape: of one patch; like: its dtype and device.
        """
        pieces = [like.new_empty(tuple(shape)) for _ in self._last]
        works = [
            dist.irecv(piece, rank, group=self._axis.reverse_group)
            for rank, piece in zip(self._last, pieces, strict=True)
        ]
        return [self._add(work, piece) for work, piece in zip(works, pieces, strict=True)]

    def finish(self) -> None:
        """Wait until everything has arrived, on this rank and on the others."""
        for piece in self._under_way:
            piece.get()
        self._under_way.clear()

    def _add(self, work: dist.Work, piece: Tensor) -> Deferred:
        # not self: a reference cycle would keep the group open after it is closed, while other
        # ranks wait in it
        traffic = self._traffic

        def arrived() -> Tensor:  # called once: a receive of gloo must not be awaited twice
            started = time.perf_counter()
            work.wait()
            traffic.wait_s += time.perf_counter() - started
            return piece

        self._under_way.append(Deferred(arrived))
        return self._under_way[-1]
