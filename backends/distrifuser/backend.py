"""DistriFuser: attaches bands to the denoiser and its ControlNets, and drives their step clock."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from backends import hooks
from backends.base import Backend, Run
from backends.distributed import Axis
from backends.distrifuser.modes import SYNC_MODES
from backends.distrifuser.networks import BandedNetwork
from backends.distrifuser.schedule import Schedule
from backends.distrifuser.tensor import attach_shards, detach_shards

logger = logging.getLogger(__name__)

WHOLE_BATCH = "whole batch"


class DistriFuserBackend(Backend):
    """Patch parallelism on the `patch` axis of the mesh, under the shared CFG split."""

    name: ClassVar[str] = "distrifuser"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._schedule = Schedule()
        self._networks: list[BandedNetwork] = []
        self._batch = 0

    def attach(self, pipe: Any) -> None:
        super().attach(pipe)
        hooks.attach(self.denoiser_of(pipe), WHOLE_BATCH, self._note_batch)

    def detach(self, pipe: Any) -> None:
        hooks.detach(self.denoiser_of(pipe), WHOLE_BATCH)
        super().detach(pipe)

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        if self.plan.options["parallelism"] == "tensor":
            attach_shards(denoiser, self.mesh)
            return
        controlnets = _controlnets(pipe)
        self._networks = [
            self._network(controlnet, name=f"controlnet {index}", choose_axis=self._patch_axis, gathers_output=False)
            for index, controlnet in enumerate(controlnets)
        ]
        self._networks.append(
            self._network(denoiser, name="denoiser", choose_axis=self._denoiser_axis, has_banded_residuals=bool(controlnets))
        )
        for network in self._networks:
            network.attach()

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        if self.plan.options["parallelism"] == "tensor":
            detach_shards(denoiser, self.mesh)
        for network in reversed(self._networks):
            network.detach()
        self._networks = []

    def begin(self, run: Run) -> None:
        for network in self._networks:
            network.reset()
        steps = self.plan.options["warmup_steps"] if run.request.warmup_steps is None else run.request.warmup_steps
        if run.request.quality == "exact":
            steps = run.num_inference_steps
        self._schedule.start(synchronous_steps=int(steps) * run.order)

    def step_done(self) -> None:
        self._schedule.step_done()

    def end(self) -> None:
        for network in self._networks:
            try:
                network.reset()
            except RuntimeError as error:  # the peer failed and will not answer; the mesh is rebuilt after a failure
                logger.warning("an exchange of the last generation did not finish: %s", error)

    def report(self) -> Mapping[str, object]:
        buffers = sum(network.buffer_bytes for network in self._networks)
        return {
            **super().report(),
            "buffer_bytes": buffers,
            "synchronous_steps": min(self._schedule.synchronous_steps, self._schedule.step),
        }

    def _network(self, module: nn.Module, **kwargs: Any) -> BandedNetwork:
        options = self.plan.options
        return BandedNetwork(
            module,
            mesh=self.mesh,
            mode=SYNC_MODES[str(options["sync_mode"])],
            schedule=self._schedule,
            extrapolates=bool(options["extrapolate"]),
            naive_scheme=str(options["split_scheme"]) if options["parallelism"] == "naive_patch" else None,
            **kwargs,
        )

    def _note_batch(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        self._batch = first.shape[0]
        return forward(*args, **kwargs)

    def _patch_axis(self, batch: int) -> tuple[Axis, tuple[float, ...]]:
        return self.mesh.axis("patch"), self.plan.options["patch_weights"]

    def _denoiser_axis(self, batch: int) -> tuple[Axis, tuple[float, ...]]:
        """The patch ranks; where the CFG split could not cut the batch, the ranks of both its halves."""
        axis, weights = self._patch_axis(batch)
        if batch == self._batch and self.mesh.axis("cfg").size > 1:
            return self.mesh.axis("cfg", "patch"), weights * self.mesh.axis("cfg").size
        return axis, weights


def _controlnets(pipe: Any) -> list[nn.Module]:
    """The pipeline's UNet ControlNets, each by itself. A transformer's runs whole on every rank: the denoiser cuts its residuals."""
    controlnet = getattr(pipe, "controlnet", None)
    nets = [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))
    return [net for net in nets if hasattr(net, "down_blocks")]
