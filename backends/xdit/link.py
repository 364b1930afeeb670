"""The messages between the stages of a pipeline, in order and in the background: tokens to the next
stage, predictions from the last.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from backends.groups.mesh import Mesh
from backends.xdit.pending import Deferred


class StageLink:
    """One denoiser call's way from the stage before and to the stage after. Every message is one
    pass's tokens.

    num_tokens: how many tokens each message has, in order. Receives are posted one message ahead,
    so that it travels while the one before is worked on; sends are kept until they are done,
    because gloo drops one whose handle is gone.
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
    """What the last stage predicts for each patch of a denoiser call, to all other stages.

    Under a CFG split each half of guidance has stages of its own. The last stage of either then
    sends to both halves' other stages, which
    need both predictions for the next step: to ask each other for them, patch by patch, they would
    have to ask in the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._axis = mesh.axis("cfg", "stage")
        num_stages = mesh.axis("stage").size
        self._last = self._axis.ranks[num_stages - 1 :: num_stages]
        self._traffic = mesh.traffic
        self._under_way: list[Deferred] = []

    def send(self, piece: Tensor) -> None:
        """From a last stage."""
        piece = piece.contiguous()
        others = [rank for rank in self._axis.ranks if rank not in self._last]
        self._traffic.add(piece, peers=len(others))
        for rank in others:
            self._add(dist.isend(piece, rank, group=self._axis.reverse_group), piece)

    def receive(self, shape: Sequence[int], like: Tensor) -> list[Deferred]:
        """On another stage: begin to receive the next piece from each last stage, in the order of
        the halves.
        """
        pieces = [like.new_empty(tuple(shape)) for _ in self._last]
        works = [
            dist.irecv(piece, rank, group=self._axis.reverse_group)
            for rank, piece in zip(self._last, pieces, strict=True)
        ]
        return [self._add(work, piece) for work, piece in zip(works, pieces, strict=True)]

    def finish(self) -> None:
        """Wait until everything has arrived, here and there."""
        for piece in self._under_way:
            piece.get()
        self._under_way.clear()

    def _add(self, work: dist.Work, piece: Tensor) -> Deferred:
        # and not self: in a cycle they would keep their group open when it is closed, and others
        # wait in it
        traffic = self._traffic

        def arrived() -> Tensor:  # asked once: gloo's receives must not be waited for twice
            started = time.perf_counter()
            work.wait()
            traffic.wait_s += time.perf_counter() - started
            return piece

        self._under_way.append(Deferred(arrived))
        return self._under_way[-1]
