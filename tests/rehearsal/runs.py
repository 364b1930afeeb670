"""One rehearsed case, on this rank: the real pipeline, mesh, backend and rank loop, beside the same
on the CPU.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends import planner
from backends.autotune.candidates import Candidate
from backends.files.generic import generic_spec
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.alarm import Alarm
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Mesh
from backends.model_table import ModelSpec
from backends.parallel.base import Backend
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, GenerateResult, LoadRequest
from hosts.ranks.commands import Generate, Outcome, Rejoin
from hosts.ranks.dispatch import CANCEL, GO_ON, Check, FollowerDispatcher, Preview, TeamDispatcher
from hosts.ranks.kept_models import KeptModels
from hosts.ranks.loop import RankLoop
from tests.backends.features import (
    TABLE,
    combined,
    parameter_counts,
    request_for,
)
from tests.backends.generic_requests import fields_of
from tests.checkpoints import checkpoint
from tests.checkpoints.variants import variant as variant_of
from tests.rehearsal.case import Ranks
from tests.rehearsal.jobs import FURTHER
from tests.rehearsal.journal import Entry, Journal
from tests.rehearsal.one_rank_cases import STEPS, OneRank
from tests.rehearsal.order import Communicator, communicators, queued_behind
from tests.rehearsal.rehearsal import Rehearsal

CPU = torch.device("cpu")
RANK_STEPS = 5
STOP_AT = 3
MIDDLE = "step 4"
"""Of RANK_STEPS, with messages under way from the step before."""


def checkpoint_of(name: str) -> Path:
    """name: a model type, or a pipeline class without a row."""
    return checkpoint(name) if name in TABLE else variant_of(name)


def spec_of(name: str) -> ModelSpec:
    return TABLE[name] if name in TABLE else generic_spec(variant_of(name))


def asked_of(spec: ModelSpec, **fields: Any) -> GenerateRequest:
    if spec.is_generic:
        return GenerateRequest(**{**fields_of(spec.pipeline, spec), "seed": 1, **fields})
    return request_for(spec, **fields)


def load(
    name: str,
    device: torch.device,
    *,
    variant: str,
    share: tuple[int, int] = (0, 1),
    **fields: Any,
) -> LoadedPipeline:
    spec = spec_of(name)
    request = LoadRequest(
        model_type=spec.name, checkpoint=str(checkpoint_of(name)), variant=variant, **fields
    )
    return load_pipeline(spec, request, device=device, share=share)


def pixels(pipe: LoadedPipeline, asked: GenerateRequest, **kwargs: Any) -> Tensor:
    return _pixels(pipe.generate(asked, **kwargs))


def _pixels(result: GenerateResult) -> Tensor:
    return torch.from_numpy(result.frames).float()


def distance(one: Tensor, other: Tensor) -> float:
    """Mean difference of two images or videos, of 255."""
    return float((one - other).abs().mean())


def rehearse_one(
    name: str, case: OneRank, *, variant: str, device: torch.device
) -> tuple[float, Rehearsal]:
    """How far the image on a GPU is from the CPU's in fp32, and what was noted. Fails for what CUDA
    refuses.
    """
    asked = asked_of(spec_of(name), num_inference_steps=STEPS, **case.request)
    with sdpa_kernel(SDPBackend.MATH):  # what the rehearsal computes attention with
        expected = pixels(load(name, CPU, variant="fp32", **{**case.load, "offload": None}), asked)
    with Rehearsal(num_devices=2, index=device.index) as rehearsal:
        pipe = load(name, device, variant=variant, **case.load)
        found = pixels(pipe, asked, on_step=_look_on(pipe, rehearsal, case))
        again = in_two_jobs(pipe, asked, case.split_at) if case.split_at else pixels(pipe, asked)
        if pipe.load.offload is None:
            pipe.rest()
            assert not list(on_gpu(pipe)), "weights stay on the GPU while the host rests"
            assert distance(found, pixels(pipe, asked)) <= 0.01, "after a rest the image differs"
    assert distance(found, again) <= 0.01, "the second image differs from the first"
    assert not rehearsal.journal.copies, rehearsal.journal.copies
    return distance(found, expected), rehearsal


def in_two_jobs(pipe: LoadedPipeline, asked: GenerateRequest, split_at: int) -> Tensor:
    """The image of a job that goes on with the latents of another one, in the denoiser's space."""
    first = asked.model_copy(update={"stop_step": split_at, "latent_space": "model"})
    latents = pipe.generate(first).latents
    rest = {"first_step": split_at, "latent_space": "model", "latents": latents}
    return pixels(pipe, asked.model_copy(update=rest))


def _look_on(
    pipe: LoadedPipeline, rehearsal: Rehearsal, case: OneRank
) -> Callable[[int, int, Tensor], None]:
    def on_step(step: int, num_steps: int, latents: Tensor) -> None:
        rehearsal.journal.step = "preview"
        if case.previews:
            assert pipe.preview(latents) is not None, "no preview"
        rehearsal.journal.step = f"step {step + 1}"

    return on_step


def on_gpu(pipe: LoadedPipeline) -> Iterator[nn.Parameter]:
    modules = [part for part in pipe.pipe.components.values() if isinstance(part, nn.Module)]
    return (
        parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.device.type == "cuda"
    )


class RehearsedDispatcher(FollowerDispatcher):
    """Gives its rank the next jobs, and goes on, cancels or ends them at a step. The journal learns
    which step is computed.
    """

    def __init__(self, journal: Journal | None, *, rank: int, watches: bool) -> None:
        """watches: whether a client of rank 0 looks on."""
        super().__init__(rank=rank)
        self.signal = GO_ON
        """From step STOP_AT on."""
        self.commands: list[Generate | Rejoin] = []
        self.outcomes: list[tuple[Sequence[GenerateResult], Outcome]] = []
        """Of jobs of a team."""
        self.steps: Counter[str] = Counter()
        """As the journal calls them -> how often they were computed."""
        self._journal = journal or Journal()
        self._watches = watches and rank == 0
        self._step = 0

    def next_command(self, check: Check) -> Generate | Rejoin | None:
        command = self.commands.pop(0) if self.commands else None
        for request in command.requests if isinstance(command, Generate) else ():
            check(request, command.methods)
        self._step = 0
        return command

    def step_signal(self) -> int:
        self._step += 1
        return self.signal if self._step >= STOP_AT else GO_ON

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None:
        if self._watches:
            self._journal.step = "preview"
            assert preview(0) is not None, "no preview"
        self._journal.step = f"step {step + 1}" if step < num_steps else "decoding"
        self.steps[self._journal.step] += 1

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None:
        self.outcomes.append((results, outcome))

    def split(self, team_size: int) -> AbstractContextManager[TeamDispatcher]:
        return nullcontext(self)


class _Loop(RankLoop):
    """A rank's loop. No clock decides where AsyncDiff cuts."""

    def _backend(self, mesh: Mesh) -> Backend:
        backend: Any = super()._backend(mesh)
        if hasattr(backend, "costs_of"):
            backend.costs_of = parameter_counts
        return backend


class Rank:
    """One rank of a case: its loop, with a pipeline attached."""

    def __init__(
        self,
        case: Ranks,
        rank: int,
        device: torch.device,
        *,
        variant: str = "fp32",
        journal: Journal | None = None,
    ) -> None:
        self._case, self._rank = case, rank
        self._spec = spec = spec_of(case.type)
        switched_on = combined([case.feature], spec) if case.feature else None
        fields = {**(switched_on.load if switched_on else {}), **case.load}
        if device.type == "cpu":
            fields.pop("offload", None)
        self.pipe = load(case.type, device, variant=variant, share=(rank, case.ranks), **fields)
        self._request = {**(switched_on.request if switched_on else {}), **case.request}
        if case.asks_for_lora:
            self._request["lora"] = combined(["lora"], spec).load["lora"]
        self.journal = journal or Journal()
        self.dispatcher = RehearsedDispatcher(self.journal, rank=rank, watches=case.previews)
        self._alarm = Alarm(dist.distributed_c10d._get_default_store().clone())
        self.opened: set[Communicator] = set()
        self.begin()

    def begin(self) -> None:
        """Open the groups and attach the method, as a host does when a model's turn comes."""
        case, rank, before = self._case, self._rank, len(self.journal.entries)
        plan = self._plan(case.backend, case.options, case.ranks)
        self.mesh = Mesh(plan, rank=rank, device=self.pipe.device, alarm=self._alarm)
        self.loop = _Loop(
            rank=rank,
            spec=self._spec,
            mesh=self.mesh,
            dispatcher=self.dispatcher,
            methods=self._methods(),
            pipeline=self.pipe,
        )
        failure = self.loop._load(self.pipe.load)
        assert failure is None, f"{failure.message}\n{failure.trace}"
        self.opened |= communicators(self.journal.entries[before:], rank)

    def _methods(self) -> dict[int, dict[str, Candidate]]:
        """None for that of the mesh alone."""
        case = self._case
        named = {case.backend: case.options, **case.changes_to}
        found = {case.ranks: self._named(named, case.ranks)}
        if case.team_size == 1:
            found[1] = self._named({"single": {}}, 1)
        elif case.team_size:
            found[case.team_size] = self._named(named, case.team_size)
        return found if case.changes_to or case.team_size else {}

    def _named(
        self, options: Mapping[str, Mapping[str, object]], ranks: int
    ) -> dict[str, Candidate]:
        return {
            name: Candidate(
                name=name, backend=name, ranks=ranks, plan=self._plan(name, given, ranks)
            )
            for name, given in options.items()
        }

    def _plan(self, backend: str, options: Mapping[str, object], ranks: int) -> ParallelPlan:
        options = {**options, "checkpoint": str(checkpoint_of(self._case.type))}
        return planner(backend)(self._spec, options, ranks)

    def job(self, method: str = "", *, rows: int = 1, **fields: Any) -> Generate:
        """method: one of those that the case changes between. rows: images, of seeds that differ.
        fields: of the request.
        """
        base = {"num_inference_steps": RANK_STEPS, "warmup_steps": 1}
        asked = asked_of(self._spec, **{**base, **self._request, **fields})
        requests = tuple(asked.model_copy(update={"seed": asked.seed + n}) for n in range(rows))
        return Generate(job_ids=(), requests=requests, methods=(method,) if method else ())

    def attempt(self, method: str = "", **fields: Any) -> tuple[Sequence[GenerateResult], Outcome]:
        if self._rank == 0:
            self.dispatcher.commands = [self.job(method, **fields)]
        results, outcome = self.loop._attempt(self.loop._next_command(), "a rehearsed job")
        self.journal.step = ""
        if outcome.failure is None:
            assert self.loop._last_step is None, "decoding began before the steps were over"
        return results, outcome

    def attempt_in_teams(self) -> tuple[Sequence[GenerateResult], Outcome]:
        """Split, let each team do a job, and rejoin. Returns that of this rank's team; a rank alone
        does two as rows of one batch.
        """
        size = self._case.team_size
        if self._rank % size == 0:
            self.dispatcher.commands = [self.job(rows=2 if size == 1 else 1), Rejoin()]
        self.loop._split(size)
        self.dispatcher.commands, self.journal.step = [], ""
        return self.dispatcher.outcomes.pop()

    def images(self) -> list[Tensor]:
        """Of the case: one; or one by each method, as jobs change between them; then those of what
        comes after.
        """
        changes = (*self._case.changes_to, self._case.backend) if self._case.changes_to else ()
        results = [result for name in ("", *changes) for result in self.results(name)]
        for what in self._case.then:
            results += FURTHER[what](self, results[0])
        return [_pixels(result) for result in results]

    def results(self, method: str = "", **fields: Any) -> Sequence[GenerateResult]:
        return done(*self.attempt(method, **fields))

    def results_of_team(self) -> Sequence[GenerateResult]:
        return done(*self.attempt_in_teams())

    def make_way(self) -> None:
        """Move the weights to main memory, as KeptModels does; `begin` is its end."""
        kept = KeptModels()
        kept.put("this", None, self.loop.release())
        assert not list(on_gpu(self.pipe)), "weights stay on the GPU"
        kept.take("this").pipeline.wake()

    def cancelled(self) -> Outcome:
        self.dispatcher.signal = CANCEL
        _, outcome = self.attempt()
        self.dispatcher.signal = GO_ON
        return outcome

    def alone(self) -> Tensor:
        """After detaching: what this rank computes by itself."""
        self.pipe.detach()
        asked = asked_of(self._spec, **{"num_inference_steps": RANK_STEPS, **self._request})
        return pixels(self.pipe, asked)

    def close(self) -> None:
        self.loop.unload()

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


def done(results: Sequence[GenerateResult], outcome: Outcome) -> Sequence[GenerateResult]:
    """The results of an attempt; fails with its failure, if there is one."""
    assert outcome.failure is None, f"{outcome.failure.message}\n{outcome.failure.trace}"
    return results


def _late_part(denoiser: nn.Module) -> nn.Module:
    names = ("up_blocks", "single_transformer_blocks", "transformer_blocks", "blocks", "layers")
    return next(getattr(denoiser, name) for name in names if hasattr(denoiser, name))[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """off: distance of the images from the same ranks' on the CPU. alone: of one rank's afterwards.
    journals: of all ranks. late: communicators that were opened in the middle of a job.
    queued_behind: see order.py. waits: of the host, 'kind at place' -> how often in a middle step.
    traffic: bytes sent, here and on the CPU.
    """

    off: float
    alone: float
    journals: list[list[Entry]]
    late: set[Communicator]
    queued_behind: dict[str, set[str]]
    waits: dict[str, float]
    traffic: tuple[int, int]


def rehearse_ranks(case: Ranks, rank: int, *, variant: str = "fp32") -> Rehearsed:
    """Fails for what CUDA refuses."""
    with sdpa_kernel(SDPBackend.MATH):
        plain = Rank(case, rank, CPU)
        expected = plain.images()
        sent = plain.mesh.traffic.sent_bytes
        expected_alone = plain.alone()
        plain.close()
    with Rehearsal(num_devices=case.ranks, index=rank) as rehearsal:
        device = torch.device("cuda", rank)
        here = Rank(case, rank, device, variant=variant, journal=rehearsal.journal)
        found = here.images()
        traffic = here.mesh.traffic.sent_bytes, sent
        opened = communicators(rehearsal.journal.entries, rank)
        assert not here.cancelled().groups_are_broken
        again = here.images()
        alone = here.alone()
        here.close()
    differences = distances(found, again)
    assert here.dispatcher.steps[MIDDLE], f"no job has a {MIDDLE}, which is looked at"
    assert max(differences) <= 0.01, f"after a cancelled job images differ: {differences}"
    assert not rehearsal.journal.copies, rehearsal.journal.copies
    assert not rehearsal.journal.pinned_bytes, "each rank pins all weights"
    return Rehearsed(
        off=largest_distance(found, expected),
        alone=distance(alone, expected_alone),
        journals=gather_outcomes(rehearsal.journal.entries),
        late=opened - here.opened,
        queued_behind=queued_behind(rehearsal.journal.entries, rank),
        waits={
            where: count / here.dispatcher.steps[MIDDLE]
            for where, count in rehearsal.journal.waits_in(MIDDLE).items()
        },
        traffic=traffic,
    )


def distances(some: list[Tensor], others: list[Tensor]) -> list[float]:
    return [distance(one, other) for one, other in zip(some, others, strict=True)]


def largest_distance(some: list[Tensor], others: list[Tensor]) -> float:
    return max(distances(some, others))


def fail_on_last_rank(
    case: Ranks, rank: int, *, is_rehearsed: bool = True, rounds: int = 1
) -> list[float]:
    """Seconds from the failure on one rank until this one has agreed on it, in each round; none for
    a rank of another team, which does not wait for it. Afterwards the next job must do well.
    """
    is_last = rank == case.ranks - 1
    is_told = rank >= case.ranks - (case.team_size or case.ranks)
    found = []
    rehearsal = Rehearsal(num_devices=case.ranks, index=rank, hang_s=15.0)
    with rehearsal if is_rehearsed else nullcontext():
        here = Rank(case, rank, torch.device("cuda", rank) if is_rehearsed else CPU)
        before = here.images()
        for _ in range(rounds):
            with here.failing(case.fails_in) if is_last else nullcontext():
                _, outcome = here.attempt_in_teams() if case.team_size else here.attempt()
            if is_told:
                found.append(time.time() - outcome.failure.time_s)
                assert "out of luck" in outcome.failure.message
                assert outcome.failure.rank == case.ranks - 1
            else:
                assert outcome.failure is None, outcome.failure
            assert here.loop._pipeline is here.pipe, "the weights were loaded again"
            distance_after = largest_distance(here.images(), before)
            assert distance_after <= 0.01, "the job after the failure differs"
        here.close()
    return found
