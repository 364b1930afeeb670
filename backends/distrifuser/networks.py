"""One network of a pipeline under patch parallelism: a denoiser, or a ControlNet that computes its
residuals.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from backends.distrifuser.cuts import (
    RowCut,
    TokenCut,
    cut_of,
    join,
    named_arguments,
    part_of,
    with_first,
)
from backends.distrifuser.modes import SyncMode
from backends.distrifuser.stale import CallBuffers
from backends.distrifuser.step_clock import StepClock
from backends.groups.collectives import gather_pieces
from backends.groups.mesh import Axis, Mesh
from backends.groups.patch_exchange import Exchange, FreshExchange
from backends.parallel import hooks
from backends.parallel.patch_bounds import PatchBounds, RowLayout, TokenLayout
from backends.parallel.patch_mode import PatchMode

_DIMS = {"row": (-2,), "col": (-1,), "alternate": (-2, -1)}
ChooseAxis = Callable[[Mapping[str, Any]], tuple[Axis, tuple[float, ...]]]
"""A call's arguments by name -> the ranks that share the call, and their weights."""

NAME = "patches"
TOKENS = "patch tokens"


class PatchedNetwork:
    """Attached to a network. Each call computes this rank's patch and gathers the patches of all
    ranks.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        mesh: Mesh,
        mode: SyncMode,
        clock: StepClock,
        choose_axis: ChooseAxis,
        keeps_older: bool = False,
        naive_scheme: str | None = None,
        is_denoiser: bool = True,
    ) -> None:
        """clock: the step clock. keeps_older: keep two steps, to extrapolate from. naive_scheme:
        exchange nothing, and cut by row, col or alternate. is_denoiser: otherwise the output is
        left as patches, and no step is skipped.
        """
        self.network = network
        self.name = name
        self._mesh, self._mode, self._clock, self._choose_axis = (
            mesh,
            mode,
            clock,
            choose_axis,
        )
        self._keeps_older = keeps_older
        self._naive_scheme = naive_scheme
        self._is_denoiser = is_denoiser
        self._cut = cut_of(network)
        self._patch_mode = PatchMode(
            network,
            image_tokens=self._cut.image_tokens,
            prompt_follows_image=isinstance(self._cut, TokenCut) and self._cut.prompt_follows_image,
        )
        self._buffers: dict[tuple[str, int], CallBuffers] = {}
        self._call: _Call | None = None

    def attach(self) -> None:
        """Hook the network, its attention and (for a transformer) its embedding and head."""
        self._patch_mode.attach()
        if isinstance(self._cut, TokenCut):
            if self._cut.embedding is not None:
                hooks.attach(
                    getattr(self.network, self._cut.embedding), TOKENS, self._around_embedding
                )
            hooks.attach(getattr(self.network, self._cut.head), TOKENS, self._around_head)
        hooks.attach(self.network, NAME, self._around)

    def detach(self) -> None:
        """Remove the hooks."""
        hooks.detach(self.network, NAME)
        if isinstance(self._cut, TokenCut):
            hooks.detach(getattr(self.network, self._cut.head), TOKENS)
            if self._cut.embedding is not None:
                hooks.detach(getattr(self.network, self._cut.embedding), TOKENS)
        self._patch_mode.detach()

    def require_size(self, height: int, width: int, weights: tuple[float, ...]) -> None:
        """Raise PlanError if latents of this size cannot be cut for these ranks. height, width: in
        latent rows and columns.
        """
        if isinstance(self._cut, TokenCut):
            self._cut.patches_of(height, width, weights, self.network.config.patch_size)
            return
        for dim in _DIMS[self._naive_scheme or "row"]:
            self._cut.patches_of(height, width, weights, dim)

    def reset(self) -> None:
        """Before and after a generation: wait for what is under way, and forget all values."""
        self._call = None
        self._patch_mode.refresh()
        for buffers in self._buffers.values():
            buffers.reset()

    @property
    def buffer_bytes(self) -> int:
        """Return the memory of all buffers."""
        return sum(buffers.num_bytes for buffers in self._buffers.values())

    def _around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = named_arguments(self.network, args, kwargs)
        sample = next(iter(arguments.values()))
        axis, weights = self._choose_axis(arguments)
        if axis.size == 1:
            return forward(**arguments)
        if self._naive_scheme is not None:
            return self._run_alone(forward, arguments, axis, weights)
        call = self._open(sample, axis, weights)
        with self._patch_mode.on(call.layout, call.exchange):
            output = forward(**self._cut.arguments(arguments, call.layout, call.patches))
        self._close(call)
        if isinstance(self._cut, TokenCut) or not self._is_denoiser:
            return output
        return with_first(output, self._gather(output[0], call, dim=-2))

    def _run_alone(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        axis: Axis,
        weights: tuple[float, ...],
    ) -> Any:
        """Compute this rank's patch as an image of its own (naive_patch)."""
        sample = next(iter(arguments.values()))
        if isinstance(self._cut, TokenCut):
            patches = self._patches(sample, weights)
            call = self._call = _Call(
                axis=axis,
                patches=patches,
                turn=0,
                layout=TokenLayout(patches, patch=axis.rank),
                exchange=None,
            )
            output = forward(**self._cut.arguments(arguments, call.layout, patches))
            self._call = None
            return output
        dim = self._clock.dim(self._naive_scheme)
        patches = self._cut.patches(sample, weights, dim)
        layout = self._cut.layout(sample, patches, axis.rank, dim)
        output = forward(**self._cut.arguments(arguments, layout, patches, dim))
        if not self._is_denoiser:
            return output
        call = _Call(axis=axis, patches=patches, turn=0, layout=layout, exchange=None)
        return with_first(output, self._gather(output[0], call, dim=dim))

    def _open(self, sample: Tensor, axis: Axis, weights: tuple[float, ...]) -> "_Call":
        patches = self._patches(sample, weights)
        # A skipped step runs few operators, and exchanges theirs at once: their values of the last
        # full step stay for the next one.
        is_skipped = self._is_denoiser and self._clock.is_skipped
        is_stale = self._mode.exactness == "approximate" and not is_skipped
        buffers = self._call_buffers() if is_stale else None
        turn, is_fresh = self._clock.turn(self._mode), self._clock.is_synchronous
        exchange: Exchange = FreshExchange(axis=axis, traffic=self._mesh.traffic)
        if buffers is not None:
            # a call without older values exchanges at once, and each rank then has the patch of its
            # own number
            is_fresh = buffers.is_fresh(is_fresh, geometry=(axis.ranks, sample.shape, sample.dtype))
            turn = 0 if is_fresh else turn
            exchange = buffers
        layout = self._layout(sample, patches, (axis.rank + turn) % axis.size)
        call = _Call(axis=axis, patches=patches, turn=turn, layout=layout, exchange=exchange)
        if buffers is not None:
            buffers.open(
                is_fresh=is_fresh,
                patch=call.layout.patch,
                axis=axis,
                extrapolates=self._clock.extrapolates,
            )
        self._call = call
        return call

    def _close(self, call: "_Call") -> None:
        if isinstance(call.exchange, CallBuffers):
            call.exchange.close()
        self._call = None

    def _call_buffers(self) -> CallBuffers:
        key = self._clock.next_call(self.name)
        if key not in self._buffers:
            self._buffers[key] = CallBuffers(
                self._mode, keeps_older=self._keeps_older, traffic=self._mesh.traffic
            )
        return self._buffers[key]

    def _patches(self, sample: Tensor, weights: tuple[float, ...]) -> PatchBounds:
        if isinstance(self._cut, RowCut):
            return self._cut.patches(sample, weights)
        return self._cut.patches(sample, weights, self.network.config.patch_size)

    def _layout(self, sample: Tensor, patches: PatchBounds, patch: int) -> RowLayout | TokenLayout:
        return (
            self._cut.layout(sample, patches, patch)
            if isinstance(self._cut, RowCut)
            else TokenLayout(patches, patch=patch)
        )

    def _gather(self, part: Tensor, call: "_Call", *, dim: int) -> Tensor:
        """Return all patches of the output, on every rank."""
        order = [(rank + call.turn) % call.axis.size for rank in range(call.axis.size)]
        shapes = [list(part.shape) for _ in order]
        for shape, patch in zip(shapes, order, strict=True):
            shape[dim] = call.patches.size(patch)
        return join(
            gather_pieces(part, shapes, axis=call.axis, traffic=self._mesh.traffic), order, dim
        )

    def _around_embedding(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Cut the image's tokens to those of this patch."""
        tokens = forward(*args, **kwargs)
        return (
            tokens
            if self._call is None
            else part_of(tokens, self._call.patches, self._call.layout.patch, 1)
        )

    def _around_head(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gather the output tokens of all patches."""
        tokens = forward(*args, **kwargs)
        return tokens if self._call is None else self._gather(tokens, self._call, dim=1)


class _Call:
    """One call of the network while it runs."""

    def __init__(
        self,
        *,
        axis: Axis,
        patches: PatchBounds,
        turn: int,
        layout: RowLayout | TokenLayout,
        exchange: Exchange | None,
    ) -> None:
        self.axis, self.patches, self.turn, self.layout, self.exchange = (
            axis,
            patches,
            turn,
            layout,
            exchange,
        )
