"""Several models at one address: an application for each, and one in front that forwards every
request to that of the model which the request names.

A job's id leads to the model of the job. A request without a name is for the first model; one of
A1111's API is for the model that was chosen in its options.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Flask, Response, current_app, request
from werkzeug import Request

from backends.errors import NotFoundError
from hosts.http import access
from hosts.http.errors import handle_errors
from hosts.http.identity.proxies import BehindProxies
from hosts.http.identity.sender import seen_owner
from hosts.jobs.store import Store

blueprint = Blueprint("models", __name__)

METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS")
BY_ID = ("/v1/jobs/", "/v1/videos/")
A1111, A1111_OPTIONS = ("/sdapi/", "/controlnet/"), "/sdapi/v1/options"
CHECKPOINT = "sd_model_checkpoint"
"""A1111's name of the model, in its options and in a request's override_settings."""


class Models:
    """The applications by model, the default first: `current_app.extensions["models"]`."""

    def __init__(self, apps: Mapping[str, Flask], store: Store) -> None:
        """store: keeps the choice of A1111's options while the ranks restart."""
        self.apps = apps
        self._store = store

    def of_job(self, job_id: str) -> Flask:
        """Return the application of a job, or the default if the job is unknown."""
        found = (app for app in self.apps.values() if app.extensions["host"].has(job_id))
        return next(found, self.default)

    def named(self, name: str) -> Flask:
        """Return the application of a model. NotFoundError if there is none."""
        if name not in self.apps:
            raise NotFoundError(f"there is no model {name!r}. Allowed: {', '.join(self.apps)}.")
        return self.apps[name]

    @property
    def default(self) -> Flask:
        return next(iter(self.apps.values()))

    @property
    def chosen(self) -> Flask:
        """Return the application of the model that A1111's options name."""
        return self.apps.get(self._store.recall(_choice()), self.default)

    def choose(self, name: str) -> None:
        self._store.remember(_choice(), name)


def create_front(apps: Mapping[str, Flask], store: Store, own: Blueprint | None = None) -> Flask:
    """Return the application in front of those of the models. own: further routes, which it
    answers itself.
    """
    models = Models(apps, store)
    host = models.default.extensions["host"]
    front = Flask("hosts.dialects", static_folder=None)
    front.config["MAX_CONTENT_LENGTH"] = models.default.config["MAX_CONTENT_LENGTH"]
    for name in ("host", "dialects", "keys"):
        front.extensions[name] = models.default.extensions[name]
    front.extensions["models"] = models
    for app in apps.values():
        app.extensions["rate"] = models.default.extensions["rate"]
        app.extensions["host"].others = {
            name: other.extensions["host"].spec.name for name, other in apps.items()
        }
    if own is not None:
        front.register_blueprint(own)
    front.register_blueprint(blueprint)
    front.wsgi_app = BehindProxies(front.wsgi_app, host.settings)
    front.before_request(lambda: access.refuse_unknown(host.settings))
    front.after_request(access.let_browsers_read)
    handle_errors(front)
    return front


@blueprint.route("/", defaults={"path": ""}, methods=METHODS)
@blueprint.route("/<path:path>", methods=METHODS)
def forward(path: str) -> Response:
    """Forward a request to the application of its model."""
    models: Models = current_app.extensions["models"]
    environ = dict(request.environ)
    if len(models.apps) == 1:
        return Response.from_app(models.default, environ)
    if request.path.startswith(BY_ID):
        return Response.from_app(models.of_job(request.path.split("/")[3]), environ)
    body = request.get_data(parse_form_data=False) if request.method == "POST" else b""
    environ["wsgi.input"] = io.BytesIO(body)
    if name := _named_model(body):
        response = Response.from_app(models.named(name), environ)
        if request.path == A1111_OPTIONS and response.status_code == 200:
            models.choose(name)
        return response
    is_a1111 = request.path.startswith(A1111)
    return Response.from_app(models.chosen if is_a1111 else models.default, environ)


def _choice() -> str:
    """Return what the store calls the choice of A1111's options: with --api_keys each key has its
    own.
    """
    owner = seen_owner()
    return "model" if owner is None else f"model-{owner[:32]}"


def _named_model(body: bytes) -> str | None:
    """Return the model that the request names, or None.

    It may be in the query, the JSON, the form, or where the A1111 web interface puts it.
    """
    if name := request.args.get("model"):
        return name
    if request.mimetype == "multipart/form-data":
        return Request({**request.environ, "wsgi.input": io.BytesIO(body)}).form.get("model")
    if request.mimetype != "application/json" or not body:
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return None  # the model's application reports what is wrong with it
    return _name_in(content)


def _name_in(content: Mapping[str, Any]) -> str | None:
    options = content if request.path == A1111_OPTIONS else content.get("override_settings")
    name = content.get("model") or (options.get(CHECKPOINT) if isinstance(options, dict) else None)
    return str(name) if name else None
