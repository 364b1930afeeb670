"""What every rank's main thread runs: next command -> do it -> agree on the outcome. The same code on all ranks.

What differs between rank 0 and the others is settled once, in the Desk: rank 0's takes jobs from the queue and answers them, a
follower's does nothing.
"""

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import psutil
import torch

from backends import backend_class
from backends.distributed import Mesh
from backends.errors import CancelledError, HostError
from backends.model_table import ModelSpec
from backends.pipeline import LoadedPipeline, load_pipeline
from backends.request import Array, GenerateRequest, GenerateResult, LoadRequest
from hosts.control import Command, Failure, Generate, Load, Stop, Verdict, agree_on_outcome, announce, breaks_groups
from hosts.jobs import Job, JobQueue
from hosts.prewarm import prewarm_request
from hosts.state import HostState, Phase

logger = logging.getLogger(__name__)

GO_ON, CANCEL = 0, 1
Check = Callable[[GenerateRequest], None]
"""Raises the HostError of a request that cannot be done; arithmetic only."""
Preview = Callable[[], Array | None]


class Desk(Protocol):
    """Where commands come from and results go to."""

    def next_command(self, check: Check) -> Command | None:
        """The next command on rank 0, already checked; None on a follower, which hears it from rank 0."""

    def step_word(self) -> int:
        """GO_ON or CANCEL, rank 0's word for this step."""

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None:
        """A step is done on all ranks. `preview()` makes a small picture of it, for whoever looks."""

    def loaded(self, failure: Failure | None) -> None: ...

    def generated(self, result: GenerateResult | None, verdict: Verdict) -> None: ...


class FollowerDesk:
    """A rank without clients."""

    def next_command(self, check: Check) -> Command | None:
        return None

    def step_word(self) -> int:
        return GO_ON

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None: ...

    def loaded(self, failure: Failure | None) -> None: ...

    def generated(self, result: GenerateResult | None, verdict: Verdict) -> None: ...


class FrontDesk:
    """Rank 0's: first the load, then jobs in the order of the queue, then stop."""

    def __init__(self, *, load: LoadRequest, queue: JobQueue, state: HostState) -> None:
        self._load: LoadRequest | None = load
        self._queue = queue
        self._state = state
        self._job: Job | None = None

    def next_command(self, check: Check) -> Command:
        if self._load is not None:
            load, self._load = self._load, None
            return Load(request=load)
        while (job := self._queue.next()) is not None:
            try:
                check(job.request)
            except Exception as error:  # noqa: BLE001  the other ranks never see what rank 0 refuses, for whatever reason
                self._queue.finish(job, error=Failure.of(error, rank=0).as_error())
                continue
            self._job = job
            return Generate(job_id=job.id, request=job.request)
        return Stop()

    def step_word(self) -> int:
        return CANCEL if self._job is not None and self._job.must_stop else GO_ON

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None:
        if self._job is not None:
            self._queue.record_step(self._job, step, num_steps, preview() if self._job.wants_preview else None)

    def loaded(self, failure: Failure | None) -> None:
        if failure is None:
            self._state.become(Phase.READY)
            return
        error = failure.as_error()
        self._state.become(Phase.FAILED, str(error))
        self._queue.close(error)

    def generated(self, result: GenerateResult | None, verdict: Verdict) -> None:
        assert self._job is not None
        job, self._job = self._job, None
        self._state.tell({"ranks_now": list(verdict.figures)})
        if result is not None:
            self._state.tell({"last_report": {"seconds": result.seconds, "num_steps": result.num_steps, **result.report}})
        if verdict.failure is not None and verdict.failure.may_be_chance and self._queue.retry(job):
            logger.warning("job %s is begun again", job.id)
            return
        self._queue.finish(job, result=result, error=verdict.failure.as_error() if verdict.failure is not None else None)


class RankLoop:
    """One rank's commands, one after the other, on its main thread: the only one that touches the device or a collective."""

    def __init__(self, *, rank: int, spec: ModelSpec, mesh: Mesh, desk: Desk) -> None:
        self._rank = rank
        self._spec = spec
        self._mesh = mesh
        self._desk = desk
        self._pipeline: LoadedPipeline | None = None

    def run(self) -> Failure | None:
        """Until Stop, or until loading failed: its Failure, else None."""
        while not isinstance(command := announce(self._desk.next_command(self._check)), Stop):
            failure = self._load(command.request) if isinstance(command, Load) else self._generate(command)
            if isinstance(command, Load) and failure is not None:
                return failure
        return None

    def _load(self, request: LoadRequest) -> Failure | None:
        started = time.perf_counter()
        failure = None
        try:
            pipeline = load_pipeline(self._spec, request, device=self._mesh.device)
            backend = backend_class(self._mesh.plan.method)(spec=self._spec, plan=self._mesh.plan, mesh=self._mesh)
            pipeline.attach(backend)
            self._pipeline = pipeline
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must hear of it before anyone goes on
            failure = self._failed(error)
        failure = agree_on_outcome(failure).failure
        if failure is None and request.prewarm_steps:
            failure = self._attempt(prewarm_request(self._spec, request))[1].failure
        if failure is None:
            logger.info("loaded %s in %.1f s", request.checkpoint, time.perf_counter() - started)
        else:
            self._pipeline = None  # frees the device: the host only answers with the reason from now on
            logger.error("loading failed: %s\n%s", failure.message, failure.trace)
        self._desk.loaded(failure)
        return failure

    def _generate(self, command: Generate) -> Failure | None:
        result, verdict = self._attempt(command.request)
        failure = verdict.failure
        if failure is not None:
            log = logger.info if failure.error is not None else logger.error
            log(
                "job %s failed on rank %d: %s%s",
                command.job_id,
                failure.rank,
                failure.message,
                "" if failure.error else f"\n{failure.trace}",
            )
        else:
            logger.info("job %s done in %.2f s", command.job_id, result.seconds)
        self._desk.generated(result, verdict)
        return failure

    def _attempt(self, request: GenerateRequest) -> tuple[GenerateResult | None, Verdict]:
        """The picture, or no picture and the first failure of any rank. Afterwards all ranks are ready for the next command."""
        result = failure = None
        try:
            result = self._pipeline.generate(request, on_step=self._on_step)
        except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must hear of it before anyone goes on
            failure = self._failed(error)
        verdict = agree_on_outcome(failure, self._figures(result))
        if verdict.groups_are_broken:
            self._mesh.rebuild()
        return (result if verdict.failure is None else None), verdict

    def _figures(self, result: GenerateResult | None) -> dict[str, Any]:
        """This rank's, after a picture: sizes in bytes, times in seconds."""
        is_cuda = self._mesh.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._mesh.device) if is_cuda else psutil.Process().memory_info().rss
        figures = {"rank": self._rank, "device": str(self._mesh.device), "memory_bytes": memory}
        if result is not None:
            kept = {name: result.report[name] for name in ("wait_s", "sent_bytes") if name in result.report}
            figures |= {"seconds": round(result.seconds, 4), **kept}
        return figures

    def _check(self, request: GenerateRequest) -> None:
        self._pipeline.check(request)

    def _on_step(self, step: int, num_steps: int, latents: torch.Tensor) -> None:
        if self._mesh.broadcast_word(self._desk.step_word()) == CANCEL:
            raise CancelledError(f"the job was cancelled at step {step} of {num_steps}.")
        self._desk.step_done(step, num_steps, lambda: self._pipeline.preview(latents))

    def _failed(self, error: Exception) -> Failure:
        failure = Failure.of(error, rank=self._rank)
        if breaks_groups(failure):
            traceback.clear_frames(error.__traceback__)  # they may hold a group, and only its last reference closes its connections
            self._mesh.destroy()  # wakes the ranks that wait for this one in a collective
        if self._mesh.device.type == "cuda" and not isinstance(error, HostError):
            torch.cuda.empty_cache()
        return failure
