"""DistriFuser: attach patches to the denoiser and its ControlNets, and run their step clock."""

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from backends.distrifuser.modes import SYNC_MODES
from backends.distrifuser.networks import PatchedNetwork
from backends.distrifuser.step_clock import StepClock
from backends.distrifuser.tensor import attach_shards, detach_shards
from backends.errors import UnsupportedError
from backends.groups.mesh import Axis
from backends.parallel import hooks
from backends.parallel.base import Backend, RunInfo
from backends.parallel.cfg_split import cut_batch
from backends.plan import Exactness, Quality, is_met
from backends.request import GenerateRequest

logger = logging.getLogger(__name__)

WHOLE_BATCH = "whole batch"
OWN_HALF = "own half"


class DistriFuserBackend(Backend):
    """Patch parallelism on the `patch` axis of the mesh, inside the shared CFG split. Source:
    DistriFusion, arXiv:2402.19481.
    """

    name: ClassVar[str] = "distrifuser"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._clock = StepClock()
        self._networks: list[PatchedNetwork] = []
        self._batch = 0
        self._is_halved = False
        self._latent_factor = 8

    def attach(self, pipe: Any) -> None:
        """Attach, and note the batch size of every call before the CFG split halves it."""
        super().attach(pipe)
        hooks.attach(self.denoiser_of(pipe), WHOLE_BATCH, self._note_batch)

    def detach(self, pipe: Any) -> None:
        """Leave the pipeline as it was found."""
        hooks.detach(self.denoiser_of(pipe), WHOLE_BATCH)
        super().detach(pipe)

    def attach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Attach patches to the denoiser and its ControlNets, or cut weights (tensor)."""
        if self.plan.options["parallelism"] == "tensor":
            attach_shards(denoiser, self.mesh)
            return
        if self.mesh.axis("cfg").size > 1:
            self.mesh.axis("cfg", "patch")  # the first use is collective
        self._latent_factor = (
            self.spec.upscale if self.spec.upscale > 1 else getattr(pipe, "vae_scale_factor", 8)
        )
        self._networks = [
            self._network(
                controlnet,
                name=f"controlnet {index}",
                choose_axis=self._controlnet_axis,
                is_denoiser=False,
            )
            for index, controlnet in enumerate(_controlnets(pipe))
        ]
        for network in self._networks:
            network.attach()
            hooks.attach(network.network, OWN_HALF, self._own_half)
        denoiser_network = self._network(denoiser, name="denoiser", choose_axis=self._denoiser_axis)
        denoiser_network.attach()
        self._networks.append(denoiser_network)

    def check(self, run: RunInfo) -> None:
        """Raise PlanError for a size that cannot be cut, and UnsupportedError for what a stale mode
        cannot follow.
        """
        if not self._networks:
            return
        if self._networks[-1].network._compiled_call_impl is not None and self._is_displaced(run):
            raise UnsupportedError(
                f"sync_mode={self.plan.options['sync_mode']} is not available with torch.compile: "
                "a compiled graph cannot wait for "
                "values of the step before. Use sync_mode=full_sync, or the CFG split on two "
                "ranks, or do not compile."
            )
        if self.plan.options["extrapolate"] and run.order > 1 and self._is_displaced(run):
            raise UnsupportedError(
                f"extrapolate=true is not available with a sampler of {run.order} evaluations per "
                "step, because they are not on one line in time. Use a sampler with one evaluation "
                "per step, or start the host without extrapolate."
            )
        factor = self._latent_factor * (2 if self.spec.latents == "packed" else 1)
        self._networks[-1].require_size(
            run.height // factor, run.width // factor, self._most_patches(run.request)
        )

    def detach_denoiser(self, pipe: Any, denoiser: nn.Module) -> None:
        """Remove them in reverse order."""
        if self.plan.options["parallelism"] == "tensor":
            detach_shards(denoiser, self.mesh)
        for network in reversed(self._networks):
            if OWN_HALF in hooks.attached(network.network):
                hooks.detach(network.network, OWN_HALF)
            network.detach()
        self._networks = []

    def exactness_of(self, run: RunInfo) -> Exactness:
        """Return how close this run comes to one rank.

        With enough synchronous steps, or quality='exact', a displaced run equals full_sync. With
        only the CFG split there are no patches.
        """
        if not self._networks or self.plan.options["parallelism"] == "naive_patch":
            return self.plan.exactness
        if len(self._most_patches(run.request)) == 1:
            return "exact"
        is_stale = (
            self._is_displaced(run) and self._synchronous_steps(run) < run.num_inference_steps
        )
        return "approximate" if is_stale else "reordered"

    def begin(self, run: RunInfo) -> None:
        """Reset the networks and start the step clock."""
        for network in self._networks:
            network.reset()
        steps = self._synchronous_steps(run)
        covers_all = (
            steps >= run.num_inference_steps
        )  # PNDM makes more evaluations than it has steps
        self._clock.start(
            synchronous_steps=sys.maxsize if covers_all else steps * run.order,
            extrapolates=self._extrapolates(run),
            step_cache=None if run.skips_whole_steps else run.step_cache,
        )

    def step_done(self) -> None:
        """Count one step."""
        self._clock.step_done()

    def end(self) -> None:
        """Wait for exchanges under way, and forget the values."""
        for network in self._networks:
            try:
                network.reset()
            except (
                RuntimeError
            ) as error:  # the peer failed and will not answer; the mesh is rebuilt after a failure
                logger.warning("an exchange of the last generation did not finish: %s", error)

    def report(self) -> Mapping[str, object]:
        """Return the shared figures, the buffers' bytes and the number of synchronous steps."""
        buffers = sum(network.buffer_bytes for network in self._networks)
        return {
            **super().report(),
            "buffer_bytes": buffers,
            "synchronous_steps": min(self._clock.synchronous_steps, self._clock.step),
        }

    def _is_displaced(self, run: RunInfo) -> bool:
        """Return whether the run has patches that keep values from step to step. Without guidance
        this is also true under the CFG split, which then has no halves.
        """
        return (
            len(self._most_patches(run.request)) > 1
            and SYNC_MODES[str(self.plan.options["sync_mode"])].exactness == "approximate"
        )

    @property
    def _may_extrapolate(self) -> bool:
        """Return what was asked for; by default True in the mode that it was measured for
        (docs/quality.md).
        """
        asked = self.plan.options["extrapolate"]
        return bool(
            self.plan.options["sync_mode"] == "corrected_async_gn" if asked is None else asked
        )

    def _extrapolates(self, run: RunInfo) -> bool:
        """Return False with two evaluations per step: they are not on one line in time."""
        return self._may_extrapolate and run.order == 1

    def _synchronous_steps(self, run: RunInfo) -> int:
        """Return how many steps of patches are synchronous. The plan's quality may be that of the
        CFG split, which a run without guidance does not have.
        """
        asked = run.request.quality
        of_patches: Quality = "high" if self.plan.is_close else "fast"
        if asked is not None and not is_met(asked, of_patches, num_steps=run.num_inference_steps):
            return run.num_inference_steps
        asked = run.request.warmup_steps
        return int(self.plan.options["warmup_steps"] if asked is None else asked)

    def _network(self, module: nn.Module, **kwargs: Any) -> PatchedNetwork:
        options = self.plan.options
        return PatchedNetwork(
            module,
            mesh=self.mesh,
            mode=SYNC_MODES[str(options["sync_mode"])],
            clock=self._clock,
            keeps_older=self._may_extrapolate,
            naive_scheme=str(options["split_scheme"])
            if options["parallelism"] == "naive_patch"
            else None,
            **kwargs,
        )

    def _note_batch(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        self._batch = first.shape[0]
        return forward(*args, **kwargs)

    def _patch_axis(self) -> tuple[Axis, tuple[float, ...]]:
        return self.mesh.axis("patch"), self.plan.options["patch_weights"]

    def _all_ranks(self) -> tuple[Axis, tuple[float, ...]]:
        """Return the ranks of both halves of the CFG split, for a batch that cannot be split."""
        return self.mesh.axis("cfg", "patch"), self.plan.options["patch_weights"] * self.mesh.axis(
            "cfg"
        ).size

    def _denoiser_axis(self, arguments: Mapping[str, Any]) -> tuple[Axis, tuple[float, ...]]:
        was_split = _batch_of(arguments) != self._batch
        return (
            self._patch_axis()
            if was_split or self.mesh.axis("cfg").size == 1
            else self._all_ranks()
        )

    def _controlnet_axis(self, arguments: Mapping[str, Any]) -> tuple[Axis, tuple[float, ...]]:
        """Return the ranks of the denoiser's call, which takes the residuals as patches."""
        splits_batch = self.mesh.axis("cfg").size > 1
        if arguments.get("guess_mode") or (splits_batch and self.spec.output == "video"):
            return self.mesh.axis(), (
                1.0,
            )  # its batch (one half, or frames) does not show the denoiser's: whole on every rank
        return self._all_ranks() if splits_batch and not self._is_halved else self._patch_axis()

    def _own_half(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute a ControlNet's residuals of this rank's half only, where the denoiser's batch
        will be split.
        """
        named = inspect.signature(forward).bind(*args, **kwargs).arguments
        parts, batch = self.mesh.axis("cfg").size, _batch_of(named)
        self._is_halved = parts > 1 and batch % parts == 0
        if self._is_halved and not named.get("guess_mode") and self.spec.output == "image":
            part = self.mesh.axis("cfg").rank
            hint = named["controlnet_cond"].chunk(parts)[part]
            named = {**cut_batch(named, batch, parts=parts, part=part), "controlnet_cond": hint}
        return forward(**named)

    def _most_patches(self, request: GenerateRequest) -> tuple[float, ...]:
        """Return the weights of the ranks that share a call: those of both halves of the CFG split
        if guidance is off.
        """
        is_guided = self.spec.guidance == "cfg" and (
            request.guidance_scale is None or request.guidance_scale > 1
        )
        halves = 1 if is_guided else self.plan.degree("cfg")
        return self.plan.options["patch_weights"] * halves


def _batch_of(arguments: Mapping[str, Any]) -> int:
    return next(iter(arguments.values())).shape[0]


def _controlnets(pipe: Any) -> list[nn.Module]:
    """Return the pipeline's UNet ControlNets, one by one. A transformer's ControlNet runs whole on
    every rank, and the denoiser cuts its residuals.
    """
    controlnet = getattr(pipe, "controlnet", None)
    nets = [] if controlnet is None else list(getattr(controlnet, "nets", [controlnet]))
    return [net for net in nets if hasattr(net, "down_blocks")]
