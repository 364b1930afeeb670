"""One rehearsed case, on this rank: the real pipeline, mesh, backend and rank loop, beside the same
on the CPU.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends import planner
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.alarm import Alarm
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest
from hosts.ranks.commands import Generate, Outcome
from hosts.ranks.dispatch import CANCEL, GO_ON, FollowerDispatcher
from hosts.ranks.loop import RankLoop
from tests.backends.features import TABLE, combined, parameter_counts, request_for
from tests.checkpoints import checkpoint
from tests.rehearsal.cases import STEPS, OneRank, Ranks
from tests.rehearsal.journal import Entry
from tests.rehearsal.rehearsal import Rehearsal

CPU = torch.device("cpu")
RANK_STEPS = 5
CANCEL_AT = 3


def load(
    spec: ModelSpec,
    device: torch.device,
    *,
    variant: str,
    share: tuple[int, int] = (0, 1),
    **fields: Any,
) -> LoadedPipeline:
    request = LoadRequest(
        model_type=spec.name, checkpoint=str(checkpoint(spec.name)), variant=variant, **fields
    )
    return load_pipeline(spec, request, device=device, share=share)


def pixels(pipe: LoadedPipeline, asked: GenerateRequest, **kwargs: Any) -> Tensor:
    return torch.from_numpy(pipe.generate(asked, **kwargs).frames).float()


def distance(one: Tensor, other: Tensor) -> float:
    """Mean difference of two images or videos, of 255."""
    return float((one - other).abs().mean())


def rehearse_one(
    name: str, case: OneRank, *, variant: str, device: torch.device
) -> tuple[float, Rehearsal]:
    """How far the image on a GPU is from the CPU's in fp32, and what was noted. Fails for what CUDA
    refuses.
    """
    spec = TABLE[name]
    asked = request_for(spec, num_inference_steps=STEPS, **case.request)
    with sdpa_kernel(SDPBackend.MATH):  # what the rehearsal computes attention with
        expected = pixels(load(spec, CPU, variant="fp32", **{**case.load, "offload": None}), asked)
    with Rehearsal(num_devices=2, index=device.index) as rehearsal:
        pipe = load(spec, device, variant=variant, **case.load)
        found = pixels(pipe, asked, on_step=_look_on(pipe, rehearsal, case))
        again = pixels(pipe, asked)
        if pipe.load.offload is None:
            pipe.rest()
            assert not list(_on_gpu(pipe)), "weights stay on the GPU while the host rests"
            pixels(pipe, asked)
    assert distance(found, again) <= 0.01, "the second image differs from the first"
    assert not rehearsal.journal.copies, rehearsal.journal.copies
    return distance(found, expected), rehearsal


def _look_on(
    pipe: LoadedPipeline, rehearsal: Rehearsal, case: OneRank
) -> Callable[[int, int, Tensor], None]:
    def on_step(step: int, num_steps: int, latents: Tensor) -> None:
        rehearsal.journal.step = "preview"
        if case.previews:
            assert pipe.preview(latents) is not None, "no preview"
        rehearsal.journal.step = f"step {step + 1}"

    return on_step


def _on_gpu(pipe: LoadedPipeline) -> Iterator[nn.Parameter]:
    modules = [part for part in pipe.pipe.components.values() if isinstance(part, nn.Module)]
    return (
        parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.device.type == "cuda"
    )


class CancellingDispatcher(FollowerDispatcher):
    """Goes on, or cancels at a step."""

    def __init__(self) -> None:
        super().__init__()
        self.cancels = False
        self._step = 0

    def step_signal(self) -> int:
        self._step += 1
        return CANCEL if self.cancels and self._step >= CANCEL_AT else GO_ON


class Rank:
    """One rank of a case: its loop, with a pipeline attached."""

    def __init__(
        self, case: Ranks, rank: int, device: torch.device, *, variant: str = "fp32"
    ) -> None:
        spec = TABLE[case.type]
        switched_on = combined([case.feature], spec) if case.feature else None
        fields = {**(switched_on.load if switched_on else {}), **case.load}
        if device.type == "cpu":
            fields.pop("offload", None)
        self.pipe = load(spec, device, variant=variant, share=(rank, case.ranks), **fields)
        self._request = {**(switched_on.request if switched_on else {}), **case.request}
        if case.asks_for_lora:
            self._request["lora"] = combined(["lora"], spec).load["lora"]
        plan = planner(case.backend)(
            spec, {**case.options, "checkpoint": str(checkpoint(case.type))}, case.ranks
        )
        self.dispatcher = CancellingDispatcher()
        self.mesh = Mesh(
            plan,
            rank=rank,
            device=device,
            alarm=Alarm(dist.distributed_c10d._get_default_store().clone()),
        )
        self.loop = RankLoop(
            rank=rank, spec=spec, mesh=self.mesh, dispatcher=self.dispatcher, pipeline=self.pipe
        )
        backend: Any = self.loop._all.backend
        if hasattr(backend, "costs_of"):
            backend.costs_of = parameter_counts
        self.pipe.attach(backend)
        self._spec = spec

    def attempt(self) -> tuple[Tensor | None, Outcome]:
        asked = request_for(
            self._spec, **{"num_inference_steps": RANK_STEPS, "warmup_steps": 1, **self._request}
        )
        results, outcome = self.loop._attempt(
            Generate(job_ids=(), requests=(asked,)), "a rehearsed job"
        )
        if outcome.failure is None:
            assert self.loop._last_step is None, "decoding began before the steps were over"
        return (torch.from_numpy(results[0].frames).float() if results else None), outcome

    def image(self) -> Tensor:
        found, outcome = self.attempt()
        assert outcome.failure is None, f"{outcome.failure.message}\n{outcome.failure.trace}"
        return found

    def cancelled(self) -> Outcome:
        self.dispatcher.cancels = True
        _, outcome = self.attempt()
        self.dispatcher.cancels = False
        return outcome

    def alone(self) -> Tensor:
        """After detaching: what this rank computes by itself."""
        self.pipe.detach()
        asked = request_for(self._spec, **{"num_inference_steps": RANK_STEPS, **self._request})
        return pixels(self.pipe, asked)

    @contextmanager
    def failing(self, part: str) -> Iterator[None]:
        """A rank whose denoiser raises in its third call, late in the network, or whose VAE
        does.
        """
        pipe = self.pipe.pipe
        module = (
            pipe.vae.decoder.up_blocks[0]
            if part == "vae"
            else _late_part(getattr(pipe, self._spec.denoiser))
        )
        inner, calls = module.forward, iter(range(1000))

        def fail(*args: Any, **kwargs: Any) -> Any:
            if part == "vae" or next(calls) >= 2:
                raise RuntimeError("this rank is out of luck")
            return inner(*args, **kwargs)

        module.forward = fail
        try:
            yield
        finally:
            module.forward = inner


def _late_part(denoiser: Any) -> nn.Module:
    return (
        denoiser.up_blocks[-1]
        if hasattr(denoiser, "up_blocks")
        else denoiser.transformer_blocks[-1]
    )


def rehearse_ranks(
    case: Ranks, rank: int, *, variant: str = "fp32"
) -> tuple[float, float, list[list[Entry]]]:
    """(distance of the image from the same ranks' on the CPU, of one rank's afterwards, all ranks'
    journals).
    """
    with sdpa_kernel(SDPBackend.MATH):
        plain = Rank(case, rank, CPU)
        expected = plain.image(), plain.alone()
        plain.mesh.destroy()
    with Rehearsal(num_devices=case.ranks, index=rank) as rehearsal:
        rehearsed = Rank(case, rank, torch.device("cuda", rank), variant=variant)
        found = rehearsed.image()
        assert not rehearsed.cancelled().groups_are_broken
        again = rehearsed.image()
        assert distance(found, again) <= 0.01, "after a cancelled job the image differs"
        alone = rehearsed.alone()
        rehearsed.mesh.destroy()
    assert not rehearsal.journal.copies, rehearsal.journal.copies
    return (
        distance(found, expected[0]),
        distance(alone, expected[1]),
        gather_outcomes(rehearsal.journal.entries),
    )


def fail_on_last_rank(case: Ranks, rank: int) -> float:
    """Seconds from the failure on one rank until this one has agreed on it; afterwards the next job
    must do well.
    """
    with Rehearsal(num_devices=case.ranks, index=rank, hang_s=15.0):
        rehearsed = Rank(case, rank, torch.device("cuda", rank))
        before = rehearsed.image()
        is_last = rank == case.ranks - 1
        if is_last:
            with rehearsed.failing(case.fails_in):
                _, outcome = rehearsed.attempt()
        else:
            _, outcome = rehearsed.attempt()
        took_s = time.time() - outcome.failure.time_s
        assert outcome.failure.rank == case.ranks - 1, outcome.failure
        assert "out of luck" in outcome.failure.message
        assert distance(rehearsed.image(), before) <= 0.01, "the job after the failure differs"
        rehearsed.mesh.destroy()
    return took_s
