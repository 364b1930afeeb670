"""Shows the progress of jobs in ComfyUI, and cancels them when its user cancels."""

import io
import queue
import threading
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
from diffusion_client import HostError, Job, JobState
from PIL import Image

LOOK_EVERY_S = 0.1
PREVIEW_SIDE = 512


def look() -> None:
    """Raise ComfyUI's own exception once its user cancels."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def follow(jobs: Sequence[Job]) -> None:
    """Show progress and previews until all jobs are done. ComfyUI's cancel cancels them on the host
    and goes on from here.
    """
    bar = comfy.utils.ProgressBar(1)
    try:
        for index, job in enumerate(jobs):
            _follow_one(job, bar, index=index, count=len(jobs))
    # also ComfyUI's own interruption, which is no Exception in some versions
    except BaseException:
        for job in jobs:
            job.abandon()
        raise


def _follow_one(job: Job, bar: Any, *, index: int, count: int) -> None:
    states: queue.SimpleQueue[JobState | HostError | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(job, states), daemon=True).start()
    while True:
        look()
        try:
            state = states.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            continue
        if state is None:
            break
        if isinstance(state, HostError):
            raise state
        _show(bar, state, index=index, count=count)
    if job.state.state != "done":
        raise HostError(job.state.error or job.state.state, status=500)


def _listen(job: Job, states: "queue.SimpleQueue[JobState | HostError | None]") -> None:
    """In a thread of its own: a step may take long, and ComfyUI's cancel must be seen meanwhile."""
    try:
        for state in job.follow(previews=True):
            states.put(state)
    except HostError as error:
        states.put(error)
    states.put(None)


def _show(bar: Any, state: JobState, *, index: int, count: int) -> None:
    """index, count: which job this is, and of how many."""
    if not state.steps:
        return
    preview = (
        ("JPEG", Image.open(io.BytesIO(state.preview)), PREVIEW_SIDE)
        if state.preview is not None
        else None
    )
    bar.update_absolute(index * state.steps + state.step, count * state.steps, preview)
