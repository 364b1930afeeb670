"""The pages at / and /docs with their files. Nothing is loaded from other sites."""

from pathlib import Path

from flask import Blueprint, Response, send_from_directory

blueprint = Blueprint("pages", __name__)

FOLDER = Path(__file__).resolve().parent
PARTS = ("page.css", "page.js", "form.js", "mask.js", "lora.js", "png.js")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; frame-ancestors "
    "'none'; base-uri 'none'; form-action 'none'"
)


@blueprint.get("/")
def page() -> Response:
    """Return the page for trying the host in a browser."""
    return _file("index.html")


@blueprint.get("/<any({}):name>".format(", ".join(f"'{name}'" for name in PARTS)))
def part(name: str) -> Response:
    """Return a file that the page loads."""
    return _file(name)


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
