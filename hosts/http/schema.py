"""GET /openapi.json, derived from the request class and the model type so that it always fits
the code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flask import Blueprint, Response, current_app
from PIL import Image
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from backends.generation.scheduler_settings import RequestedSettings
from backends.generation.schedulers import SCHEDULERS
from backends.model_table import ModelSpec
from backends.request import CALL_DEFAULTS, IMAGE_STRENGTH, GenerateRequest
from hosts.http import VERSION, media
from hosts.http.decode import Accepted
from hosts.http.dialect import JSON, Dialect, Operation, Rule, error_body
from hosts.http.jobs_api import JobView
from hosts.http.limits import BOUNDS
from hosts.launch.settings import Settings

blueprint = Blueprint("schema", __name__)

ENCODED = "base64 of a PNG, JPEG or WebP file, with or without a data: header."
ARRAY = "base64 of a .npy file."
EVENTS = "text/event-stream"

BOUND = {"integer": "maximum", "string": "maxLength"}
JOB_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The client's own name for the job: sending it again creates no second one.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
}


class _Schema(GenerateJsonSchema):
    """A schema in which images and arrays are text."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        is_image = schema["cls"] is Image.Image
        return {
            "type": "string",
            "contentEncoding": "base64",
            "description": ENCODED if is_image else ARRAY,
        }


@blueprint.get("/openapi.json")
def serve() -> Response:
    """Return the OpenAPI 3.1 document of this host, in reading order."""
    host, dialects = current_app.extensions["host"], current_app.extensions["dialects"]
    document = openapi(host.spec, host.settings, dialects, models=host.models)
    return Response(json.dumps(document), mimetype="application/json")


def openapi(
    spec: ModelSpec,
    settings: Settings,
    dialects: Iterable[Dialect] = (),
    *,
    models: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of this host and of its other dialects.

    models: the names that requests may have.
    """
    document = _own(spec, settings)
    request = document["components"]["schemas"]["Request"]["properties"]
    if models:
        request["model"]["enum"] = [*models, None]
    for dialect in dialects:
        for operation in dialect.operations:
            calls = document["paths"].setdefault(operation.path, {})
            calls[operation.method] = _foreign(operation, dialect, request)
    return document


def _foreign(operation: Operation, dialect: Dialect, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the operation of another API.

    request: the fields of /v1/jobs, some of which it accepts.
    """
    answer = {"type": "string"} if operation.media_type != JSON[0] else {}
    contents = {operation.media_type: {"schema": answer}}
    if operation.rules is not None and "stream" in operation.rules:
        contents[EVENTS] = {"schema": {"type": "string"}}
    shape = {name: _kind(value) for name, value in dialect.error_body("", 400, "").items()}
    error = {"type": "object", "properties": shape, "required": list(shape)}
    found: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Done.", "content": contents},
            "default": {"description": "An error.", "content": {JSON[0]: {"schema": error}}},
        },
    }
    if "{id}" in operation.path:
        found["parameters"] = [JOB_ID]
    if operation.rules is not None:
        fields = {name: _field(rule, request.get(name)) for name, rule in operation.rules.items()}
        body = {"type": "object", "properties": fields, "additionalProperties": False}
        found["requestBody"] = {"required": True, "content": {JSON[0]: {"schema": body}}}
    return found


def _field(rule: Rule, own: dict[str, Any] | None) -> dict[str, Any]:
    """Return the schema of another API's field. own: the same field of /v1/jobs, if it exists."""
    if rule.kind == "done":
        return own or {}
    if rule.accepted is None:
        return {"description": f"Accepted, and without effect: {rule.reason}."}
    accepted = ", ".join(json.dumps(value) for value in rule.accepted)
    says = f"Accepted: {accepted}. Others are refused" if accepted else "Refused"
    return {"description": f"{says}: {rule.reason}."}


def _kind(value: Any) -> dict[str, Any]:
    return {"type": "object"} if isinstance(value, dict) else {"type": "string"}


def _own(spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    files = {
        kind: {"schema": {"type": "string", "contentMediaType": kind}}
        for kind in media.content_types(spec.output)
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{spec.title} on several GPUs",
            "version": VERSION,
            "license": {"name": "Apache-2.0"},
        },
        "paths": {
            "/generate": {
                "post": _operation(
                    "Generate an image or video and wait for it.",
                    body="Request",
                    answers={"200": _answer("Done.", "Generated", files)},
                )
            },
            "/v1/jobs": {
                "post": _operation(
                    "Queue a job.",
                    body="Request",
                    answers={"202": _answer("Accepted.", "Job")},
                    parameters=[IDEMPOTENCY_KEY],
                ),
                "get": _operation(
                    "All jobs: running, waiting and finished.",
                    answers={"200": _answer("The jobs.", "Jobs")},
                ),
            },
            "/v1/jobs/{id}": {
                "get": _operation(
                    "State and progress.", answers={"200": _answer("The job.", "Job")}, by_id=True
                ),
                "delete": _operation(
                    "Cancel it.",
                    answers={"202": _answer("It ends at its next step.", "Job")},
                    by_id=True,
                ),
            },
            "/v1/jobs/{id}/result": {
                "get": _operation(
                    "The image or video, by Accept; of several images that of ?image=N.",
                    answers={
                        "200": _answer("The file.", "Generated", files),
                        "409": _answer("It is not done.", "Job"),
                    },
                    by_id=True,
                )
            },
            "/v1/jobs/{id}/events": {
                "get": _operation(
                    "Server-sent events `status` and, with ?previews=1, `preview`.",
                    answers={
                        "200": {
                            "description": "Until the job is over.",
                            "content": {EVENTS: {"schema": {"type": "string"}}},
                        }
                    },
                    by_id=True,
                )
            },
            "/v1/jobs/{id}/trace": {
                "get": _operation(
                    "What every rank did when, as a Chrome trace.",
                    answers={
                        "200": _answer("The trace.", "Object"),
                        "409": _answer("It is not over.", "Job"),
                    },
                    by_id=True,
                )
            },
            "/initialize": {
                "get": _operation(
                    "202 while loading, 200 when ready.", answers={"200": _text(), "202": _text()}
                )
            },
            "/progress": {
                "get": _operation("Percent of the running job.", answers={"200": _text()})
            },
            "/healthz": {
                "get": _operation(
                    "Phase of the host.", answers={"200": _answer("Alive.", "Object")}
                )
            },
            "/livez": {
                "get": _operation("200 while the process answers.", answers={"200": _text()})
            },
            "/readyz": {
                "get": _operation(
                    "200 while images can be generated.", answers={"200": _text(), "503": _text()}
                )
            },
            "/metrics": {"get": _operation("For Prometheus.", answers={"200": _text()})},
            "/measure": {
                "post": _operation(
                    "Time the methods again and compare an image of each with one rank's.",
                    answers={
                        "200": _answer("The table of methods.", "Object"),
                        "422": _answer("There is one method only.", "Error"),
                    },
                )
            },
            "/settings": {
                "get": _operation(
                    "What was chosen at start, and why.",
                    answers={"200": _answer("Facts.", "Object")},
                )
            },
        },
        "components": {"schemas": _schemas(spec, settings)},
    }


def _limit_images(facts: dict[str, Any], most: int) -> None:
    """Say how many images a field holds: no list if it is one."""
    facts["anyOf"] = [
        {**kind, "minItems": 1, "maxItems": most} if kind.get("type") == "array" else kind
        for kind in facts["anyOf"]
        if most > 1 or kind.get("type") != "array"
    ]


def _schemas(spec: ModelSpec, settings: Settings) -> dict[str, Any]:
    request = GenerateRequest.model_json_schema(schema_generator=_Schema)
    unused = Accepted.by(settings).unused(spec).keys() - {*(spec.own.takes if spec.own else ())}
    fields = {name: facts for name, facts in request["properties"].items() if name not in unused}
    request |= {"title": "Request", "additionalProperties": False, "properties": fields}
    request["required"] = [
        name for name in spec.requires if name in fields and name != "prompt"
    ]  # embeddings may replace it
    if "image" in fields:
        _limit_images(fields["image"], max(each.most_images for each in (spec, spec.own or spec)))
    if "strength" in fields and "init_image" in fields:
        fields["strength"]["default"] = IMAGE_STRENGTH
    for name in ("height", "width", "num_inference_steps", "guidance_scale", "num_frames"):
        given = getattr(settings, name, None)
        is_open = spec.is_generic or (spec.sizes_by_image and name in ("height", "width"))
        if name in fields and (given or not is_open):
            fields[name]["default"] = given or getattr(spec, name)
    if "fps" in fields:
        fields["fps"]["default"] = spec.frames_per_s
    for name, default in {**CALL_DEFAULTS, "clip_skip": 0}.items():
        if name in fields:
            fields[name]["default"] = default
    for name in ("height", "width"):
        if name in fields and spec.size_multiple > 1:
            fields[name]["description"] = f"Pixels. Multiples of {spec.size_multiple}."
    for name, limit in BOUNDS.items():
        _bound(fields.get(name, {}), settings, limit)
    settings_of = RequestedSettings.model_json_schema(schema_generator=_Schema)["properties"]
    named = {
        "type": "object",
        "properties": {"scheduler": {"type": "string"}, **settings_of},
        "additionalProperties": False,
    }
    fields["scheduler"]["anyOf"] = [
        named,
        *(kind for kind in fields["scheduler"]["anyOf"] if kind.get("type") != "object"),
    ]
    fields["scheduler"]["examples"] = [
        name for name, facts in SCHEDULERS.items() if facts.flow == spec.flow_matching
    ]
    job = JobView.model_json_schema(ref_template="#/components/schemas/{model}")
    error = {name: _constant(value) for name, value in error_body("", 400).items()}
    error["message"] = {"type": "string"}
    generated = {
        "message": {"const": "OK"},
        "output": {"type": "string"},
        "is_image": {"const": spec.output == "image"},
    }
    if spec.returns_latents:
        generated["latent"] = {"type": "string"}
    return {
        "Request": request,
        **job.pop("$defs"),
        "Job": job,
        "Jobs": {
            "type": "object",
            "properties": {"jobs": {"type": "array", "items": {"type": "object"}}},
            "required": ["jobs"],
        },
        "Generated": {"type": "object", "properties": generated, "required": list(generated)},
        "Error": {"type": "object", "properties": error, "required": list(error)},
        "Object": {"type": "object"},
    }


def _bound(field: dict[str, Any], settings: Settings, limit: str) -> None:
    """Write the operator's limit into the non-null alternative of a field."""
    for kind in field.get("anyOf", [field]):
        if kind.get("type") in BOUND:
            kind[BOUND[kind["type"]]] = getattr(settings, limit)


def _constant(value: object) -> dict[str, Any]:
    return {"type": "null"} if value is None else {"const": value}


def _operation(
    summary: str,
    *,
    answers: dict[str, Any],
    body: str | None = None,
    by_id: bool = False,
    parameters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {**answers, "default": _answer("An error.", "Error")},
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(body)}},
        }
    if by_id or parameters:
        operation["parameters"] = [*parameters, *([JOB_ID] if by_id else [])]
    return operation


def _answer(description: str, schema: str, files: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": _ref(schema)}, **(files or {})},
    }


def _text() -> dict[str, Any]:
    return {
        "description": "Text.",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "text/html": {"schema": {"type": "string"}},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
