"""The v2 protocol of the existing clients: /apply, /applied, /offload, /sleep and /close.

For a host that was started without a model. Responses are short texts with 200 or 500
(docs/compat.md).
"""

import importlib.util
import logging
import math
import os
import signal
from dataclasses import replace

from flask import Blueprint, Response, current_app, jsonify, request

from backends.errors import HostError, RequestError, UnsupportedError
from backends.model_table import read_table
from backends.request import why_loras_are_fixed
from hosts.compat.routes import log_refusal
from hosts.compat.v2_config import read_configuration
from hosts.http.access import require_operator
from hosts.http.dialect import Dialect, error_body
from hosts.http.request_io import json_object
from hosts.launch.settings import Settings
from hosts.ranks.model_control import Apply, ModelControl, Offload, Sleep

logger = logging.getLogger(__name__)
blueprint = Blueprint("compat_v2", __name__)
DIALECT = Dialect(blueprint=blueprint, is_body_optional=True, needs_model=False)

BROWSER_HEADERS = ("Origin", "Referer", "Sec-Fetch-Site")
"""A browser sends at least one of them with any request that a page causes, also for an image
URL.
"""
MAX_SLEEP_S = 3600.0


@blueprint.before_request
def _refuse_others() -> None:
    """Refuse keys of --api_keys, and browsers: some of these routes change the host with a GET, as
    the clients expect.
    """
    if request.endpoint != f"{blueprint.name}.applied":
        require_operator()
    if sent := [name for name in BROWSER_HEADERS if name in request.headers]:
        raise RequestError(
            f"{request.path} is not for browsers, and this request has the header {sent[0]}. Send "
            "it from a program."
        )


@blueprint.errorhandler(HostError)
def _failed(error: HostError) -> tuple[Response, int]:
    """Return 500, since clients know 200 and 500 only. The reason is for people."""
    log_refusal(error)
    status = 400 if isinstance(error, RequestError) else 500
    return jsonify(error_body(str(error), status)), status


@blueprint.post("/apply")
def apply() -> str:
    """Load this pipeline on all ranks in place of the current one, and wait for it.

    An empty object only unloads.
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
        # Plan first: errors are refused before anything changes.
        start = _control().plan(settings) if settings is not None else None
        _control().applied = None
        _control().run(Apply(settings=settings))
        if start is not None:
            host.settings, host.spec, _control().applied = settings, start.spec, body
            host.fixed_loras = why_loras_are_fixed(start.load, start.plan)
    return ""


@blueprint.get("/applied")
def applied() -> Response:
    """Return the loaded configuration, or None."""
    body = _control().applied
    return jsonify(body) if body is not None else Response("None", mimetype="text/plain")


@blueprint.route("/offload", methods=["GET", "POST"])
def offload() -> str:
    """Move the weights to main memory until the next image."""
    _control().run(Offload())
    return "the weights are in main memory"


@blueprint.post("/sleep")
def sleep() -> str:
    """{"sleep": true, "time": seconds}: pause all ranks but the first for this time."""
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


def _with_compel(settings: Settings) -> Settings:
    """Load Compel where it is available: each request says whether it uses it."""
    is_supported = read_table()[settings.type].supports("single", "compel").status != "unsupported"
    return replace(settings, compel=is_supported and importlib.util.find_spec("compel") is not None)


def _control() -> ModelControl:
    return current_app.extensions["host"].protocol.control
