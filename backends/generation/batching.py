"""Which requests may be rows of one batch, so that one call of a pipeline makes the images of
several jobs. Imports no torch.

A row equals what its request gives alone, but for the order of sums. So everything is left out
whose result for one row depends on the
others: noise that is not drawn from each request's own seed, decisions by a mean over the batch,
weights of texts.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backends.errors import RequestError, UnsupportedError
from backends.generation.schedulers import SCHEDULERS, choose_scheduler
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan
from backends.request import GenerateRequest, LoadRequest

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

OWN = ("prompt", "negative_prompt", "seed")
"""The fields in which the requests of one batch may differ."""


def batch_key(request: GenerateRequest, load: LoadRequest) -> str | None:
    """Requests with the same key fit into one batch; None for one that must be alone.

    Alone: what brings images, latents or embeddings, what asks for quality='exact', and what has no
    prompt.
    """
    if not request.prompt or request.quality == "exact" or _draws_for_all(request, load):
        return None
    shared = {
        name: value
        for name in GenerateRequest.model_fields
        if name not in OWN and (value := getattr(request, name)) is not None
    }
    try:
        return json.dumps({**shared, "has_negative": bool(request.negative_prompt)}, sort_keys=True)
    except (
        TypeError,
        ValueError,
        RecursionError,
    ):  # an image or an array, or values that no JSON can hold
        return None


def why_alone(spec: ModelSpec, load: LoadRequest) -> str:
    """Why a pipeline that is loaded like this makes one image at a time; empty if it can make
    several.
    """
    if not spec.is_batchable:
        return f"a row of a batch of {spec.title} depends on the others"
    reasons = {
        "--step_cache decides by all of a batch": load.step_cache is not None,
        "--compel weights one prompt at a time": load.compel,
        "a ControlNet or an IP-Adapter takes an image with each job": bool(
            load.control_net or load.ip_adapter
        ),
        "compiled models would be compiled again for each size of batch": load.compile is not None,
        "bitsandbytes' int8 looks for outliers in all of a batch": any(
            spec.kind == "bnb_int8" for spec in load.quantize.values()
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def require_one_batch(
    requests: Sequence[GenerateRequest],
    spec: ModelSpec,
    load: LoadRequest,
    scheduler: "SchedulerMixin",
    plan: ParallelPlan | None,
) -> None:
    """UnsupportedError unless these may be rows of one batch. scheduler: as it was built for them.
    plan: of a backend, if there is one.
    """
    keys = {batch_key(request, load) for request in requests}
    reason = why_alone(spec, load)
    if plan is not None and plan.world_size > 1:
        reason = f"{plan.describe()} works on one image at a time"
    elif None in keys:
        reason = "one of them must be alone"
    elif len(keys) > 1:
        reason = "they differ in more than texts and seed"
    elif draws_for_all(type(scheduler).__name__, scheduler.config):
        reason = f"{type(scheduler).__name__} draws noise for the whole batch"
    if reason:
        raise UnsupportedError(
            f"these {len(requests)} requests cannot be rows of one batch: {reason}. Generate them "
            "one by one."
        )


def draws_for_all(class_name: str, config: Any) -> bool:
    """Whether a scheduler's noise is drawn for the whole batch, and not from a generator for each
    row.
    """
    names = {facts.class_name for facts in SCHEDULERS.values() if facts.draws_for_all}
    return class_name in names or bool(config.get("stochastic_sampling"))


def _draws_for_all(request: GenerateRequest, load: LoadRequest) -> bool:
    """The same by a request's words. A checkpoint's own scheduler is not known here: the pipeline
    looks at it.
    """
    try:
        choice = choose_scheduler(request.scheduler, load.scheduler)
    except RequestError:
        return True  # it will be refused, alone
    return draws_for_all(
        SCHEDULERS[choice.name].class_name if choice.name is not None else "", choice.overrides
    )
