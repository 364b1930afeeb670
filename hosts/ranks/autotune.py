"""--backend=auto once the ranks are connected: the final choice, by the measurements of an earlier
launch or by measuring now.
"""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from backends.autotune.ranking import Image, Measured
from backends.autotune.trials import PipelineSubject, Trials
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.alarm import Alarm
from backends.groups.control_group import broadcast_command
from backends.plan import QUALITIES
from hosts.launch.auto_backend import candidates_of, halves_of, recall_from, remember
from hosts.launch.start_plan import StartPlan
from hosts.ranks.commands import Failure, agree_on_outcome
from hosts.ranks.warmup import prewarm_request
from hosts.supervision.progress import LOAD_WITHIN_S, Activity

logger = logging.getLogger(__name__)

TRIAL_STEPS = 20
"""Steps of the image whose first steps are timed: enough for them to resemble those of a real
one.
"""


def tune(
    start: StartPlan,
    plan: Callable[[Measured], StartPlan],
    *,
    folder: Path | None,
    rank: int,
    world_size: int,
    device: torch.device,
    activity: Activity,
    alarm: Alarm | None = None,
) -> tuple[StartPlan, LoadedPipeline | None]:
    """Return the start plan that all ranks will use, and the pipeline if measuring has loaded it.
    Every rank must call this.

    plan: the start plan by measured figures; all ranks use rank 0's. folder: where rank 0 keeps
    figures for the next launch, if anywhere. activity: learns that this may take as long as
    loading.
    """
    needs_all = start.load.divided or start.load.encoder_placement != "every"
    if start.auto is None or needs_all:  # one rank alone could not be measured
        return start, None
    pipeline = None
    measured = broadcast_command(recall_from(folder)(start.auto.key) if rank == 0 else None)
    if measured is None:
        activity.begin("loading and benchmarking methods", within_s=LOAD_WITHIN_S)
        pipeline, measured = _measure(
            start, rank=rank, world_size=world_size, device=device, alarm=alarm
        )
        activity.rest()
        if measured is not None and rank == 0 and folder is not None:
            remember(folder, start.auto.key, measured)
    if measured is None:
        measured = broadcast_command(start.auto.measured if rank == 0 else None)
    settled = plan(measured)
    for line in settled.auto.text():
        logger.info("%s", line)
    return settled, pipeline


def measure_again(
    start: StartPlan,
    pipeline: LoadedPipeline,
    *,
    with_closeness: bool,
    must_end: Callable[[], bool],
    folder: Path | None,
    rank: int,
    world_size: int,
    alarm: Alarm | None,
) -> Measured:
    """Time the methods of a loaded pipeline once more. Every rank must call this.

    with_closeness: also generate an image with each approximate method and compare it with one
    rank's. must_end: asked on rank 0, see Trials.measure. The pipeline has no backend attached.
    """
    old = start.auto.measured
    trials = _trials(start, pipeline, rank=rank, world_size=world_size, alarm=alarm)
    new = _time_methods(trials, start, must_end)
    merged = replace(
        new,
        steps={**old.steps, **new.steps},
        spread={**old.spread, **new.spread},
        closeness=old.closeness,
    )
    if with_closeness:
        approximate = [
            candidate
            for candidate in candidates_of(start.auto)
            if candidate.plan is not None
            and candidate.quality != "exact"
            and (candidate.timed_as or candidate.name) in merged.steps
        ]
        closeness, failures = trials.closeness(approximate)
        merged = replace(merged, closeness=closeness, failures={**merged.failures, **failures})
    if rank == 0 and folder is not None:
        remember(folder, start.auto.key, merged)
    return merged


def _trials(
    start: StartPlan, pipeline: LoadedPipeline, *, rank: int, world_size: int, alarm: Alarm | None
) -> Trials:
    timed, whole = (
        prewarm_request(start.spec, replace(start.load, prewarm_steps=steps))
        for steps in (TRIAL_STEPS, start.load.num_inference_steps or start.spec.num_inference_steps)
    )
    return Trials(
        PipelineSubject(pipeline, timed, whole),
        spec=start.spec,
        halves=halves_of(start.spec),
        rank=rank,
        world_size=world_size,
        alarm=alarm,
    )


def _time_methods(
    trials: Trials, start: StartPlan, must_end: Callable[[], bool] = lambda: False
) -> Measured:
    measured = trials.measure(
        candidates_of(start.auto),
        quality=start.auto.quality,
        image=Image(num_steps=start.spec.num_inference_steps),
        also=[level for level in QUALITIES if level != start.auto.quality],
        must_end=must_end,
    )
    return replace(measured, date=time.strftime("%Y-%m-%d"))


def _measure(
    start: StartPlan, *, rank: int, world_size: int, device: torch.device, alarm: Alarm | None
) -> tuple[LoadedPipeline | None, Measured | None]:
    """Return the loaded pipeline and the figures, or nothing if any rank fails: the loop then loads
    again and reports the problem.
    """
    pipeline = failure = measured = None
    try:
        pipeline = load_pipeline(start.spec, start.load, device=device)
    # the other ranks must learn of any error before they continue
    except Exception as error:  # noqa: BLE001
        failure = Failure.of(error, rank=rank)
    if agree_on_outcome(failure).failure is None:
        try:
            trials = _trials(start, pipeline, rank=rank, world_size=world_size, alarm=alarm)
            measured = _time_methods(trials, start)
        except Exception as error:  # noqa: BLE001  as above
            failure = Failure.of(error, rank=rank)
        if (outcome := agree_on_outcome(failure)).failure is None:
            return pipeline, measured
        logger.warning(
            "benchmarking the methods failed, so the estimate decides: %s", outcome.failure.message
        )
    del pipeline
    gc.collect()  # pipelines hold themselves in cycles
    return None, None
