"""Which requests may share a batch, and so one pipeline call. Imports no torch.

A row equals the result of its request alone, up to the order of sums. So everything that makes a
row depend on the others is excluded: noise that is not drawn from each request's own seed,
decisions by a mean over the batch, prompt weights.
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
    """Return a key, equal for requests that fit into one batch; None if it must run alone.

    Alone: requests with images, latents or embeddings, with quality='exact', without a prompt or
    with weights in it.
    """
    if not request.prompt or request.quality == "exact" or _draws_for_all(request, load):
        return None
    if request.prompt_syntax is not None:
        return None
    shared = {
        name: value
        for name in GenerateRequest.model_fields
        if name not in OWN and (value := getattr(request, name)) is not None
    }
    try:
        return json.dumps({**shared, "has_negative": bool(request.negative_prompt)}, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None  # an image, an array, or a value that JSON cannot hold


def why_alone(spec: ModelSpec, load: LoadRequest) -> str:
    """Return why a pipeline loaded like this runs one image at a time; empty if it can batch."""
    if not spec.is_batchable:
        return f"a row of a batch of {spec.title} depends on the others"
    reasons = {
        "--step_cache decides once for a whole batch": load.step_cache is not None,
        "--compel weights one prompt at a time": load.compel,
        "a ControlNet or an IP-Adapter needs an image with each job": bool(
            load.control_net or load.ip_adapter
        ),
        "compiled models would be recompiled for each batch size": load.compile is not None,
        "bitsandbytes' int8 looks for outliers across the whole batch": any(
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
    """Raise UnsupportedError unless these requests may be rows of one batch.

    scheduler: the one built for them. plan: the attached backend's, if there is one.
    """
    keys = {batch_key(request, load) for request in requests}
    reason = why_alone(spec, load)
    if plan is not None and plan.world_size > 1:
        reason = f"{plan.describe()} generates one image at a time"
    elif None in keys:
        reason = "one of them must run alone"
    elif len(keys) > 1:
        reason = "they differ in more than prompts and seed"
    elif draws_for_all(type(scheduler).__name__, scheduler.config):
        reason = f"{type(scheduler).__name__} draws noise for the whole batch"
    if reason:
        raise UnsupportedError(
            f"these {len(requests)} requests cannot be rows of one batch: {reason}. Generate them "
            "one by one."
        )


def draws_for_all(class_name: str, config: Any) -> bool:
    """Return whether a scheduler draws noise for the whole batch, not per row."""
    names = {facts.class_name for facts in SCHEDULERS.values() if facts.draws_for_all}
    return class_name in names or bool(config.get("stochastic_sampling"))


def _draws_for_all(request: GenerateRequest, load: LoadRequest) -> bool:
    """Return the same for a request whose scheduler is not built yet.

    The checkpoint's own scheduler is not known here; require_one_batch checks it.
    """
    try:
        choice = choose_scheduler(request.scheduler, load.scheduler)
    except RequestError:
        return True  # it will be refused on its own
    return draws_for_all(
        SCHEDULERS[choice.name].class_name if choice.name is not None else "", choice.overrides
    )
