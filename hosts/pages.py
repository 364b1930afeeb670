"""The page at / and its two files, and the schema. Nothing is fetched from anywhere else."""

from pathlib import Path

from flask import Blueprint, Response, current_app, jsonify, send_from_directory

from hosts.schema import openapi

blueprint = Blueprint("pages", __name__)

FOLDER = Path(__file__).resolve().parent / "page"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@blueprint.get("/")
def page() -> Response:
    """To try the host in a browser."""
    return _file("index.html")


@blueprint.get("/page.css")
def style() -> Response:
    return _file("page.css")


@blueprint.get("/page.js")
def script() -> Response:
    return _file("page.js")


@blueprint.get("/openapi.json")
def schema() -> Response:
    """OpenAPI 3.1 of what this host serves."""
    host = current_app.extensions["host"]
    return jsonify(openapi(host.spec, host.settings))


def _file(name: str) -> Response:
    answer = send_from_directory(FOLDER, name, max_age=0)
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    return answer
