"""The pages at / and /docs with their files. Nothing is loaded from other sites."""

from pathlib import Path

from flask import Blueprint, Response, send_from_directory

blueprint = Blueprint("pages", __name__)

FOLDER = Path(__file__).resolve().parent
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors "
    "'none'; base-uri 'none'; form-action 'none'"
)


@blueprint.get("/")
def page() -> Response:
    """Return the page for trying the host in a browser."""
    return _file("index.html")


@blueprint.get("/page.css")
def style() -> Response:
    return _file("page.css")


@blueprint.get("/page.js")
def script() -> Response:
    return _file("page.js")


@blueprint.get("/form.js")
def form_script() -> Response:
    return _file("form.js")


@blueprint.get("/mask.js")
def mask_script() -> Response:
    return _file("mask.js")


@blueprint.get("/docs")
def docs() -> Response:
    """Return the API documentation page."""
    return _file("docs.html")


@blueprint.get("/docs.js")
def docs_script() -> Response:
    return _file("docs.js")


def _file(name: str) -> Response:
    answer = send_from_directory(FOLDER, name, max_age=0)
    answer.headers["Content-Security-Policy"] = POLICY
    answer.headers["X-Content-Type-Options"] = "nosniff"
    return answer
