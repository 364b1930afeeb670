"""What a new process takes over from the store: the jobs that an earlier one left there."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from backends.errors import HostError
from hosts.jobs.job import Job, JobStatus, cancelled_before_it_ran
from hosts.jobs.store import Store
from hosts.supervision.exit_reports import ExitReport

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Recovery:
    """The jobs of the store, in the order in which they were accepted."""

    jobs: list[Job]
    """All of them. Finished ones are in this list only."""
    queued: list[Job] = field(default_factory=list)
    """They wait as before."""
    interrupted: list[Job] = field(default_factory=list)
    """They ran when the process ended, and may be started once more."""
    failed: list[tuple[Job, HostError]] = field(default_factory=list)
    """They end now, each with this error."""


def recover(store: Store, complete: Callable[[ExitReport], ExitReport]) -> Recovery:
    """Read the store and decide what becomes of each job. complete: adds to the exit report of the
    earlier process what else is known about its end.
    """
    found = Recovery(jobs=store.load())
    report = store.last_report()  # always read, which removes it: it would be wrong next time
    if any(job.status is JobStatus.RUNNING for job in found.jobs):
        report = complete(report)
    for job in found.jobs:
        if not job.finished.is_set():
            _classify(job, found, report)
    if waiting := len(found.queued) + len(found.interrupted):
        logger.info("%d jobs were taken over from the store", waiting)
    return found


def _classify(job: Job, found: Recovery, report: ExitReport) -> None:
    """Put an unfinished job into the list in which it belongs."""
    if job.cancel_requested:
        found.failed.append((job, cancelled_before_it_ran(job)))
    elif job.status is JobStatus.QUEUED:
        found.queued.append(job)
    elif report.jobs is not None and job.id not in report.jobs:
        job.attempts -= 1  # another rank was lost, or this one before it began
        found.interrupted.append(job)
    elif not job.may_start_again or (report.is_crash and report.jobs == (job.id,)):
        found.failed.append((job, _gave_up(job, report)))
    else:
        logger.warning(
            "job %s is begun again: the ranks ended while it ran (%s)", job.id, report.why
        )
        found.interrupted.append(job)


def _gave_up(job: Job, report: ExitReport) -> HostError:
    if report.is_crash:
        what = f"this job ended a rank, so it is not tried again: {report.why}"
    else:
        what = (
            f"the ranks ended {job.attempts} times while this job ran, so it is not tried again. "
            f"The last time: {report.why}"
        )
    return HostError(
        f"{what}. Ask for less (size, frames), or see the host's log. "
        f"{report.last_lines(job.id)}".strip()
    )
