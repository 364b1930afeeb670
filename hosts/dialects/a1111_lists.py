"""Lists that A1111's clients request before they generate: models, samplers, LoRAs, options, ...

Also empty lists of features that this host lacks.
"""

from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from backends.main_memory import main_memory
from hosts.dialects.a1111_fields import require_model
from hosts.dialects.a1111_info import read_infotext
from hosts.dialects.a1111_options import RULES
from hosts.dialects.a1111_passes import IMAGE_UPSCALERS, LATENT_UPSCALERS
from hosts.dialects.a1111_prompt import alias_of, lora_files
from hosts.dialects.a1111_samplers import SCHEDULE_LABELS, labels
from hosts.http import images
from hosts.http.decode import decoded
from hosts.http.dialect import (
    DONE,
    Operation,
    is_strict,
    require_known,
)
from hosts.http.request_io import json_object

blueprint = Blueprint("a1111_lists", __name__)

EMPTY: dict[str, Any] = {
    "sd-vae": [],
    "sd-modules": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "script-info": [],
    "extensions": [],
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "cmd-flags": {},
}
"""Empty lists of missing features. Clients request them and fail without a response."""
PNG_INFO = {"image": DONE}
"""The fields of POST /sdapi/v1/png-info."""


@blueprint.get("/sdapi/v1/<any({}):name>".format(", ".join(f"'{name}'" for name in EMPTY)))
def nothing(name: str) -> Response:
    """Return an empty list of this kind."""
    return jsonify(EMPTY[name])


@blueprint.get("/sdapi/v1/latent-upscale-modes")
def latent_upscale_modes() -> Response:
    return jsonify([{"name": name} for name in LATENT_UPSCALERS])


@blueprint.get("/sdapi/v1/upscalers")
def upscalers() -> Response:
    """Return what hires fix and extra-single-image may use, without the latent modes of hires
    fix.
    """
    facts = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    names = (*IMAGE_UPSCALERS, *current_app.extensions["host"].accepted.upscalers)
    return jsonify([{"name": name, **facts} for name in names])


@blueprint.get("/sdapi/v1/memory")
def memory() -> Response:
    """Return the main memory. GET /settings has each rank's, and its GPU's."""
    ram = main_memory()
    return jsonify(
        {
            "ram": {"free": ram.available, "used": ram.total - ram.available, "total": ram.total},
            "cuda": {},
        }
    )


@blueprint.post("/sdapi/v1/png-info")
def png_info() -> Response:
    """Return the settings that A1111 and this host write into a PNG."""
    body = json_object()
    require_known(body, PNG_INFO)
    accepted = current_app.extensions["host"].accepted

    def read() -> Mapping[str, Any]:
        return images.from_text(body.get("image"), (), accepted.decode_limits).info

    facts = decoded(read, field="image", wanted="Send base64 of a PNG, JPEG or WebP file")
    text = facts.get("parameters", "")
    items = {name: value for name, value in facts.items() if isinstance(value, str)}
    return jsonify({"info": text, "items": items, "parameters": read_infotext(text)})


@blueprint.get("/internal/ping")
def ping() -> Response:
    """Confirm that the host responds."""
    return jsonify({})


@blueprint.post("/sdapi/v1/<any('refresh-checkpoints', 'refresh-loras', 'refresh-vae'):name>")
def refresh(name: str) -> Response:
    """Do nothing: lists are read anew for each request."""
    return jsonify({})


@blueprint.get("/sdapi/v1/options")
def options() -> Response:
    return jsonify(_options())


@blueprint.post("/sdapi/v1/options")
def set_options() -> Response:
    """Accept only values that are already set: options are fixed at start.

    But for the model where there are several: hosts/dialects/models.py has chosen it by now.
    """
    body = json_object()
    if is_strict(body):
        require_model(body.get("sd_model_checkpoint"), _title())
        require_known(body, RULES)
    return jsonify({})


@blueprint.get("/sdapi/v1/sd-models")
def sd_models() -> Response:
    """Return the models that requests and options may name."""
    none = {"hash": None, "sha256": None, "config": None}
    return jsonify(
        [
            {"title": name, "model_name": name, "filename": name, **none}
            for name in current_app.extensions["host"].models
        ]
    )


@blueprint.get("/sdapi/v1/samplers")
def samplers() -> Response:
    found = labels(current_app.extensions["host"].spec)
    return jsonify(
        [
            {"name": label, "aliases": [name, f"k_{name}"], "options": {}}
            for label, name in found.items()
        ]
    )


@blueprint.get("/sdapi/v1/schedulers")
def schedulers() -> Response:
    facts = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    return jsonify(
        [{"name": name, "label": label, **facts} for name, label in SCHEDULE_LABELS.items()]
    )


@blueprint.get("/sdapi/v1/loras")
def loras() -> Response:
    """Return the files that requests may name in their prompt or in `lora`."""
    folders = current_app.extensions["host"].accepted.lora_dirs
    return jsonify(
        [
            {"name": path.stem, "alias": alias_of(path), "path": inside, "metadata": {}}
            for path, inside in lora_files(folders)
        ]
    )


LISTS = (
    "options", "sd-models", "samplers", "schedulers", "loras", "upscalers",
    "latent-upscale-modes", "memory", *EMPTY,
)  # fmt: skip
OPERATIONS = (
    *(
        Operation(method="get", path=f"/sdapi/v1/{name}", summary=f"A1111: {name}.")
        for name in LISTS
    ),
    Operation(
        method="post",
        path="/sdapi/v1/png-info",
        summary="A1111: the settings in a PNG.",
        rules=PNG_INFO,
    ),
    Operation(
        method="post",
        path="/sdapi/v1/options",
        summary="A1111: options are fixed; only what is so already can be set.",
        rules=RULES,
    ),
)


def _options() -> dict[str, Any]:
    return {
        "sd_model_checkpoint": _title(),
        "sd_vae": "Automatic",
        "samples_format": "png",
        "CLIP_stop_at_last_layers": 1,
        "eta_noise_seed_delta": 0,
        "enable_pnginfo": True,
    }


def _title() -> str:
    return current_app.extensions["host"].model
