"""PipeFusion: consecutive blocks on different ranks (stages), through which the image passes in
patches.

In each denoiser call the first `warmup_steps` steps send all tokens through the stages at once.
Later steps send patch after patch, so that all stages work at the same time. A patch attends to
keys and values of this step where they are computed already, and of the step before where they are
not. The last stage has the whole prediction at the end of the call. The other stages have one whose
patches are under way (pending.py) and continue with guidance and scheduler, and the first stage
begins the next step with the patches that have arrived. So stages do not wait between steps if
there are enough patches, and the pipeline need not know.

The two halves of a guidance batch follow each other through the stages. They share nothing, so they
fill the stages without making any value older.

Source: PipeFusion, arXiv:2405.14430, sections 4.1 and 4.2.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import HostError, PlanError, UnsupportedError
from backends.groups.collectives import broadcast
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.cfg_split import cut_batch
from backends.parallel.weight_shards import KeptWeights
from backends.xdit.layout import Layout, StaleKVCache, sizes
from backends.xdit.link import PredictionLink, StageLink
from backends.xdit.pending import PatchGrid, PendingTensor
from backends.xdit.tokens import TokenCut

NAME = "xdit stage"
ONCE = "xdit once per step"


@dataclass(slots=True)
class _Part:
    """One half of the guidance batch (or the whole batch) of one denoiser call of each step."""

    layout: Layout
    batch: int
    """Batch size of the whole call."""
    stale: StaleKVCache = field(default_factory=StaleKVCache)
    is_filled: bool = False
    """Whether `stale` has the keys and values of a whole pass."""
    tokens: Tensor | None = None
    """The last stage's results so far, (B, N, D)."""
    once: dict[nn.Module, Any] = field(default_factory=dict)
    """Results of this step by modules that give the same for every patch."""

    def fits(self, layout: Layout, batch: int) -> bool:
        return self.layout == layout and self.batch == batch


class PipeFusion:
    """Attached to one denoiser. Until it is detached, this rank keeps the weights of its own
    stage's blocks only.

    UnsupportedError for denoisers that cannot be cut into stages, PlanError if the blocks do not
    fit the stages.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        mesh: Mesh,
        *,
        num_patches: int,
        blocks_per_stage: tuple[int, ...] | None,
    ) -> None:
        self._cut = TokenCut(denoiser, mesh, collect=self._collect)
        self._denoiser = denoiser
        self._mesh = mesh
        self._num_patches = num_patches
        if self._cut.transformer.crosses_skips:
            raise UnsupportedError(
                f"pipefusion_parallel_degree is not available for {type(denoiser).__name__}: its "
                "later blocks read skip connections from earlier ones. Use --ulysses_degree or "
                "--ring_degree."
            )
        if not self._cut.transformer.has_stages:
            raise UnsupportedError(
                f"pipefusion_parallel_degree is not available for {type(denoiser).__name__}. Use "
                "--ulysses_degree or --ring_degree."
            )
        self._blocks = [
            block for name in self._cut.transformer.blocks for block in getattr(denoiser, name)
        ]
        embed = self._cut.transformer.embed
        self._embedding = getattr(denoiser, embed) if embed is not None else None
        self._patchless = _patchless(denoiser, self._embedding)
        self._bounds = stage_bounds(len(self._blocks), mesh.axis("stage").size, blocks_per_stage)
        self._weights: KeptWeights | None = None
        self._warmup_steps = 1
        self._step = 0
        self._calls = 0
        self._parts: dict[tuple[int, int, int], _Part] = {}
        self._part: _Part | None = None
        self._link: StageLink | None = None
        self._link_back: PredictionLink | None = None
        self._under_way: list[StageLink | PredictionLink] = []
        self._input: PendingTensor | None = None

    def attach(self) -> None:
        """Hook blocks and denoiser, and drop the other stages' weights."""
        for module in self._patchless:
            hooks.attach(module, ONCE, self._once(module))
        self._cut.attach()
        stage = self._mesh.axis("stage").rank
        for index, block in enumerate(self._blocks):
            if self._is_mine(index):
                if index == self._bounds[stage] and stage > 0:
                    hooks.attach(block, NAME, self._receive_then_run)
            else:
                sends = index == self._bounds[stage + 1]
                hooks.attach(block, NAME, self._send_and_skip if sends else self._skip)
        parts = [self._blocks[start:stop] for start, stop in itertools.pairwise(self._bounds)]
        self._weights = KeptWeights(parts, kept=stage)
        hooks.attach(self._denoiser, NAME, self._call)

    def detach(self) -> None:
        """Remove the hooks and fetch the other stages' weights. Collective, like attach."""
        hooks.detach(self._denoiser, NAME)
        for block in self._blocks:
            if NAME in hooks.attached(block):
                hooks.detach(block, NAME)
        self._cut.detach()
        for module in self._patchless:
            hooks.detach(module, ONCE)
        if self._weights is not None:
            self._weights.restore(self._mesh.axis("stage"))
            self._weights = None

    def begin(self, warmup_steps: int) -> None:
        """Start a generation. warmup_steps: synchronous denoiser evaluations, at least 1."""
        self.end()
        self._warmup_steps = warmup_steps

    def step_done(self) -> None:
        """Count one step."""
        self._step += 1
        self._calls = 0

    def end(self) -> None:
        """Forget everything. Wait for what is under way, unless this rank alone has failed: the
        groups are then rebuilt.
        """
        failure = (
            sys.exception()
        )  # a HostError is raised on all ranks alike, after the same messages
        try:
            if failure is None or isinstance(failure, HostError):
                self._finish(but=0)
        finally:
            self._step = self._calls = 0
            self._parts.clear()
            self._under_way.clear()
            self._part = self._link = self._link_back = self._input = None

    def _finish(self, *, but: int) -> None:
        """Wait for all messages except those of the last `but` links."""
        while len(self._under_way) > but:
            self._under_way.pop(0).finish()

    def _is_mine(self, index: int) -> bool:
        stage = self._mesh.axis("stage").rank
        return self._bounds[stage] <= index < self._bounds[stage + 1]

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self._predict(forward, self._cut.bind(args, kwargs))
        except HostError as error:
            # a HostError means that all ranks refuse alike, but here other stages may wait for this
            # one, so the groups must be closed
            raise RuntimeError(str(error)) from error
        finally:
            self._part = self._link = None

    def _predict(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Return the denoiser's output for the whole batch, on every stage."""
        layout = self._cut.layout(arguments, num_patches=self._num_patches)
        name, latents = next(iter(arguments.items()))
        batch = latents.shape[0]
        num_parts = 2 if batch % 2 == 0 else 1
        parts = [self._remembered(part, num_parts, layout, batch) for part in range(num_parts)]
        self._calls += 1
        for part in parts:
            part.once.clear()
        patches = self._patches(parts)
        grid = self._grid(latents, layout) if patches != [None] else None
        self._take_in(latents, grid)
        if isinstance(latents, PendingTensor):
            arguments[name] = latents.whole() if self._input is None else latents.buffer
        halves = [
            cut_batch(arguments, batch, parts=num_parts, part=part) for part in range(num_parts)
        ]
        own = self._mesh.axis("ring", "ulysses").rank
        has_text = self._cut.transformer.text is not None
        counts = [layout.shard(own, patch=patch).count(with_text=has_text) for patch in patches]
        self._link = StageLink(self._mesh, [count for count in counts for _ in parts])
        self._link_back = PredictionLink(self._mesh)
        outputs: list[Any] = [None] * num_parts
        for patch in patches:
            if self._input is not None and self._is_first_stage:
                self._input.fill(patch)
            for index, part in enumerate(parts):
                self._part = part
                outputs[index] = self._cut.run(
                    forward, halves[index], layout, patch=patch, stale=part.stale
                )
                part.is_filled = True
            if grid is not None and self._is_last_stage:
                self._link_back.send(torch.cat([grid.take(output[0], patch) for output in outputs]))
        prediction = self._from_last_stage(torch.cat([output[0] for output in outputs]), grid)
        self._under_way += [self._link_back, self._link]
        return (
            (prediction, *outputs[0][1:])
            if isinstance(outputs[0], tuple)
            else type(outputs[0])(sample=prediction)
        )

    def _grid(self, latents: Tensor, layout: Layout) -> PatchGrid | None:
        """Return where the patches of a prediction are; None if all must travel together."""
        if self._mesh.axis("data").size > 1:  # its collective needs the whole
            return None
        spans = [layout.patch(patch)[1] for patch in range(self._num_patches)]
        return PatchGrid.of(latents, spans, self._denoiser.config.patch_size)

    def _take_in(self, latents: Tensor, grid: PatchGrid | None) -> None:
        """Keep the latents of this call if they are still arriving in the patches of this call."""
        self._finish(but=2)
        # complete the last input: the first stage has used it, and on the other stages deferred
        # arithmetic would pile up
        if self._input is not None:
            self._input.whole()
        self._input = (
            latents if isinstance(latents, PendingTensor) and latents.grid == grid else None
        )

    @property
    def _is_first_stage(self) -> bool:
        return self._mesh.axis("stage").rank == 0

    @property
    def _is_last_stage(self) -> bool:
        return self._mesh.axis("stage").rank == self._mesh.axis("stage").size - 1

    def _remembered(self, part: int, num_parts: int, layout: Layout, batch: int) -> _Part:
        """Return the state of this part of the call from the step before; a new one if the shape
        has changed.
        """
        key = (self._calls, part, num_parts)
        if key not in self._parts or not self._parts[key].fits(layout, batch):
            self._parts[key] = _Part(layout=layout, batch=batch)
        return self._parts[key]

    def _patches(self, parts: list[_Part]) -> list[int | None]:
        """Return the passes of this call: all tokens at once (None) during warm-up or if nothing is
        stored, else patch by patch.
        """
        is_whole = self._step < self._warmup_steps or not all(part.is_filled for part in parts)
        return [None] if is_whole else list(range(self._num_patches))

    def _once(self, module: nn.Module) -> hooks.Around:
        """Return a hook that runs a module in the first pass of each step and repeats its result
        later.
        """

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._part is None or (
                module is self._embedding and self._input is not None and self._is_first_stage
            ):
                return forward(*args, **kwargs)  # its latents have grown by a patch since
            if module not in self._part.once:
                self._part.once[module] = forward(*args, **kwargs)
            return self._part.once[module]

        return around

    def _receive_then_run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the first block of this stage on the tokens of the stage before."""
        assert self._link is not None
        hidden, text = self._link.receive(*self._streams(args, kwargs))
        streams = (
            {"hidden_states": hidden}
            if text is None
            else {"hidden_states": hidden, "encoder_hidden_states": text}
        )
        return (
            forward(*args[1:], **{**kwargs, **streams})
            if not args
            else forward(hidden, *args[1:], **kwargs)
        )

    def _send_and_skip(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Send the inputs of the next stage's first block there, ControlNet residuals included."""
        assert self._link is not None
        self._link.send(*self._streams(args, kwargs))
        return self._skip(forward, *args, **kwargs)

    def _skip(self, _forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the inputs of another stage's block unchanged."""
        hidden, text = self._streams(args, kwargs)
        return hidden if text is None else (text, hidden)

    def _streams(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the tokens that run through the blocks: image, and text where it does too."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden, kwargs[
            "encoder_hidden_states"
        ] if self._cut.transformer.text is not None else None

    def _collect(self, tokens: Tensor) -> Tensor:
        """Return all image tokens (B, N, D) for the output layers: the real ones on the last stage
        after its last patch, a stand-in of the right shape elsewhere.
        """
        this, part = self._cut.current, self._part
        assert part is not None
        if not self._is_last_stage:
            return tokens.new_zeros(()).expand(
                tokens.shape[0], this.layout.num_image, tokens.shape[2]
            )
        tokens = self._cut.gather(tokens)
        if this.patch is None:
            return tokens
        if part.tokens is None:
            part.tokens = tokens.new_zeros(tokens.shape[0], this.layout.num_image, tokens.shape[2])
        start, stop = this.layout.patch(this.patch)[1]
        part.tokens[:, start:stop] = tokens
        return part.tokens

    def _from_last_stage(self, prediction: Tensor, grid: PatchGrid | None) -> Tensor:
        """Return the last stage's prediction on every stage: complete, or still under way."""
        stage, traffic = self._mesh.axis("stage"), self._mesh.traffic
        if grid is None:
            prediction = prediction.contiguous()
            if self._is_last_stage:
                traffic.add(prediction, peers=stage.size - 1)
            started = time.perf_counter()
            broadcast(prediction, source=stage.size - 1, axis=stage)
            traffic.wait_s += time.perf_counter() - started
        elif not self._is_last_stage:
            assert self._link_back is not None
            shapes = [
                grid.piece_shape(prediction.shape, patch) for patch in range(self._num_patches)
            ]
            pieces = [self._link_back.receive(shape, prediction) for shape in shapes]
            halves = [
                PendingTensor(of_half, grid, prediction, prediction.device)
                for of_half in zip(*pieces, strict=True)
            ]
            mine = halves[self._mesh.axis("cfg").rank]
            mine.gathered = torch.cat(halves) if len(halves) > 1 else None
            return mine
        return prediction


def _patchless(denoiser: nn.Module, embedding: nn.Module | None) -> list[nn.Module]:
    """Return the modules whose result is the same for every patch of a step: the embedding of the
    whole image, and the modulation of the norms.

    A norm's modulation is a matrix times one vector. It reads all its weights for almost no
    arithmetic, and would do so once per patch.
    """
    norms = [
        module
        for module in denoiser.modules()
        if type(module).__name__.startswith(("AdaLayerNorm", "SD35AdaLayerNorm"))
    ]
    modulations = [norm.linear for norm in norms if hasattr(norm, "linear")]
    return [*([embedding] if embedding is not None else []), *modulations]


def stage_bounds(
    num_blocks: int, num_stages: int, blocks_per_stage: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Return where each stage begins, and the end: (0, ..., num_blocks). PlanError if the blocks do
    not fit the stages.
    """
    per_stage = blocks_per_stage if blocks_per_stage is not None else sizes(num_blocks, num_stages)
    if len(per_stage) != num_stages or sum(per_stage) != num_blocks or min(per_stage) < 1:
        raise PlanError(
            f"attn_layer_num_for_pp={list(per_stage)} does not divide {num_blocks} transformer "
            f"blocks among {num_stages} stages. Allowed: {num_stages} numbers from 1 with the sum "
            f"{num_blocks}. Change them, or use fewer stages."
        )
    return tuple(sum(per_stage[:stage]) for stage in range(num_stages + 1))
