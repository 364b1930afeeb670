"""The clients' later protocol: /apply, /applied, /offload, /sleep and /close of a host that was
started without a model.

The answers are the contract's: short texts, 200 or 500. What a later /generate says differently is
translated here too.
"""

import importlib.util
import logging
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

from backends.errors import HostError, RequestError, UnsupportedError
from backends.model_table import read_table
from hosts.compat.v2_config import read_configuration
from hosts.http.request_io import json_object
from hosts.launch.settings import Settings
from hosts.ranks.model_control import Apply, ModelControl, Offload, Sleep

logger = logging.getLogger(__name__)
blueprint = Blueprint("later", __name__)

BROWSER_HEADERS = ("Origin", "Referer", "Sec-Fetch-Site")
"""At least one of them comes with whatever a page makes a browser ask, also with an image's
address.
"""
NO_END = 2**31
"""The clients' number for a last step that is none is 2**32 - 1."""
MAX_SLEEP_S = 3600.0


@blueprint.before_request
def _refuse_browsers() -> None:
    """Some of these change the host with a GET, as the clients want it, so no browser may ask."""
    if sent := [name for name in BROWSER_HEADERS if name in request.headers]:
        raise RequestError(
            f"{request.path} is not for browsers, and this request has the header {sent[0]}. Send "
            "it from a program."
        )


@blueprint.errorhandler(HostError)
def _failed(error: HostError) -> tuple[Response, int]:
    """The clients know 200 and 500; the reason is for people."""
    body = {"message": str(error), "output": None, "latent": None, "is_image": False}
    return jsonify(body), 400 if isinstance(error, RequestError) else 500


@blueprint.post("/apply")
def apply() -> str:
    """Load this pipeline on all ranks in the place of the one that is there; an empty object only
    lets that go. Waits until it is done.
    """
    host = current_app.extensions["host"]
    body = dict(json_object())
    with _control().lock:
        if body == _control().applied:
            return ""
        settings = (
            _with_compel(read_configuration(body, base=_control().base, table=read_table()))
            if body
            else None
        )
        start = (
            _control().plan(settings) if settings is not None else None
        )  # what is wrong with it is refused while all is as it was
        _control().applied = None
        _control().run(Apply(settings=settings))
        if start is not None:
            host.settings, host.spec, _control().applied = settings, start.spec, body
    return ""


@blueprint.get("/applied")
def applied() -> Response:
    """The configuration that is loaded, or None."""
    body = _control().applied
    return jsonify(body) if body is not None else Response("None", mimetype="text/plain")


@blueprint.route("/offload", methods=["GET", "POST"])
def offload() -> str:
    """Keep the weights in main memory until the next image."""
    _control().run(Offload())
    return "the weights are in main memory"


@blueprint.post("/sleep")
def sleep() -> str:
    """{"sleep": true, "time": seconds}: all ranks but the first pause for so long."""
    body = json_object()
    seconds = body.get("time", 0)
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 0 <= seconds <= MAX_SLEEP_S
        or not math.isfinite(seconds)
    ):
        raise RequestError(
            f"time={seconds!r} is not allowed. Send seconds from 0 to {MAX_SLEEP_S:g}.",
            field="time",
        )
    if _control().num_ranks == 1:
        raise UnsupportedError(
            "sleep is not available with one rank: there is no other that could pause."
        )
    if body.get("sleep") is True:
        _control().run(Sleep(seconds=float(seconds)))
    return ""


@blueprint.route("/close", methods=["GET", "POST"])
def close() -> str:
    """Stop the host, as SIGTERM does."""
    os.kill(os.getpid(), signal.SIGTERM)
    return "stopping"


def v1_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a later /generate in the names of the earlier one. Steps are counted, not shares,
    and latents are the model's own.
    """
    fields = {
        name: value
        for name, value in body.items()
        if name not in ("denoise", "denoising_start", "denoising_end")
    }
    first, stop = _step(body, "denoising_start"), _step(body, "denoising_end")
    if first:
        fields["first_step"] = first
    if stop is not None and stop < NO_END:
        fields["stop_step"] = stop
    return {"use_compel": False, **fields, "latent_space": "model"}


def _step(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(
            f"{name}={value!r} is not allowed. Send the number of a step, from 0.", field=name
        )
    return value


def _with_compel(settings: Settings) -> Settings:
    """Requests say whether they use it, so it is loaded wherever it can be."""
    is_supported = read_table()[settings.type].supports("single", "compel").status != "unsupported"
    return replace(settings, compel=is_supported and importlib.util.find_spec("compel") is not None)


def _control() -> ModelControl:
    return current_app.extensions["host"].protocol.control
