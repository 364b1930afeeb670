"""A1111's alwayson_scripts: ControlNet units become our fields, other scripts are refused.

Also the lists of its ControlNet extension (/controlnet), without which programs offer no units.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from backends.errors import NotFoundError, RequestError, UnsupportedError
from hosts.http.decode import Accepted
from hosts.http.dialect import (
    DONE,
    OFF,
    Operation,
    Rule,
    harmless,
    is_empty,
    neutral,
    refused,
    require_known,
    shown,
)

blueprint = Blueprint("a1111_control", __name__)

NO_PREPROCESSOR = "images are used as they are. Send the map itself, with module none"
ONLY_PREPROCESSOR = "only preprocessors use it"
SWITCHED = ("adetailer",)
"""Scripts whose first argument turns them on."""
NAMES = ("controlnet", "sd_forge_controlnet", "controlnetforforgeofficial")
UNIT: dict[str, Rule] = {
    "enabled": DONE,
    "image": DONE,
    "input_image": DONE,
    "weight": DONE,
    "guidance_start": DONE,
    "guidance_end": DONE,
    "module": neutral("none", reason=NO_PREPROCESSOR),
    "model": harmless("the loaded ControlNet is used"),
    "mask": refused("masks of units are not supported"),
    "mask_image": refused("masks of units are not supported"),
    "effective_region_mask": refused("masks of units are not supported"),
    "control_mode": neutral(0, "balanced", reason="prompt and map have equal weight"),
    "resize_mode": neutral(
        0,
        1,
        "just resize",
        "crop and resize",
        "scale to fit (inner fit)",
        "inner fit (scale to fit)",
        reason="maps are scaled to the size",
    ),
    "guidance": neutral(1, reason="send guidance_end"),
    "inpaint_crop_input_image": harmless("only inpainting preprocessors use it"),
    "hr_option": harmless("only hires fix uses it"),
    "low_vram": harmless("it only affects memory"),
    "lowvram": harmless("it only affects memory"),
    "pixel_perfect": harmless(ONLY_PREPROCESSOR),
    "processor_res": harmless(ONLY_PREPROCESSOR),
    "threshold_a": harmless(ONLY_PREPROCESSOR),
    "threshold_b": harmless(ONLY_PREPROCESSOR),
    "guessmode": neutral(*OFF, reason="prompt and map have equal weight"),
    "save_detected_map": harmless(ONLY_PREPROCESSOR),
    "advanced_weighting": refused("all layers have the same weight"),
    "ipadapter_input": refused("use the field ip_adapter_image of /v1/jobs"),
    "pulid_mode": harmless(ONLY_PREPROCESSOR),
    "union_control_type": neutral("unknown", "all", reason="union ControlNets are not loaded"),
    "batch_images": refused("send the image of the unit"),
    "input_mode": neutral("simple", reason="send the image of the unit"),
    "use_preview_as_input": harmless(ONLY_PREPROCESSOR),
    "generated_image": harmless(ONLY_PREPROCESSOR),
}
"""The fields of one unit."""
VERSION = 3
"""Of the extension's API: units have control_mode and pixel_perfect."""
NOTHING = "None"
"""The extension's name for no model."""
MODULES = ("none",)
LISTS = ("version", "model_list", "module_list", "control_types", "settings")
OPERATIONS = tuple(
    Operation(method="get", path=f"/controlnet/{name}", summary=f"A1111's ControlNet: {name}.")
    for name in LISTS
)


@blueprint.get("/controlnet/<any({}):name>".format(", ".join(f"'{name}'" for name in LISTS)))
def controlnet(name: str) -> Response:
    """Return the loaded ControlNets in the extension's shape. Their only module is none.

    Without one there is nothing here, as without the extension, and programs offer no units.
    """
    models = loaded()
    if not models:
        raise NotFoundError("no ControlNet is loaded (--control_net).")
    every = {
        "module_list": MODULES,
        "model_list": [NOTHING, *models],
        "default_option": MODULES[0],
        "default_model": models[0],
    }
    detail = {"model_free": False, "sliders": []}
    facts: dict[str, dict[str, Any]] = {
        "version": {"version": VERSION},
        "model_list": {"model_list": every["model_list"]},
        "module_list": {
            "module_list": MODULES,
            "module_detail": dict.fromkeys(MODULES, detail),
        },
        "control_types": {"control_types": {"All": every}},
        "settings": {"control_net_unit_count": len(models)},
    }
    return jsonify(facts[name])


@blueprint.post("/controlnet/detect")
def detect() -> Response:
    raise UnsupportedError(
        f"controlnet_module is not available: {NO_PREPROCESSOR}.", field="controlnet_module"
    )


def loaded() -> list[str]:
    """Return the names of the ControlNets, in the order in which they take the units' images."""
    host = current_app.extensions["host"]
    names = [PurePath(path).stem for path in host.settings.control_net or {}]
    many = host.accepted.launch.control_nets
    return names if len(names) == many else [f"ControlNet {1 + each}" for each in range(many)]


def control_fields(
    scripts: Mapping[str, Any], accepted: Accepted, *, start: Any = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the /v1/jobs fields of the units, and the names under which they were sent.

    start: the image of img2img, which units without one of their own get.
    """
    units: list[Mapping[str, Any]] = []
    for name, script in scripts.items():
        args = _args(script)
        if name.lower() in NAMES:
            units += [_unit(each) for each in args if _is_on(each)]
        elif any(args) and not (name.lower() in SWITCHED and args[0] is False):
            raise UnsupportedError(
                f"alwayson_scripts.{name[:80]} is not available: scripts of the web interface do "
                "not run here. Leave it out.",
                field="alwayson_scripts",
            )
    if not units:
        return {}, {}
    if not accepted.takes_control_image:
        raise UnsupportedError(
            "alwayson_scripts.controlnet is not available: no ControlNet is loaded "
            "(--control_net). Leave it out.",
            field="alwayson_scripts",
        )
    for number, unit in enumerate(units):
        if is_empty(_source(unit)) and is_empty(start):
            raise RequestError(
                f"alwayson_scripts.controlnet: unit {number} has no image. Send one, or enabled "
                "false.",
                field="alwayson_scripts",
            )
    units = [{**unit, "image": start} if is_empty(_source(unit)) else unit for unit in units]
    return _fields(_ordered(units, loaded()))


def _ordered(units: list[Mapping[str, Any]], models: list[str]) -> list[Mapping[str, Any]]:
    """Return the units in the order of their models, if all of them name loaded ones."""
    named = [unit.get("model") for unit in units]
    is_known = all(isinstance(name, str) and name in models for name in named)
    return sorted(units, key=lambda unit: models.index(unit["model"])) if is_known else units


def _fields(units: list[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    fields: dict[str, Any] = {"control_image": [_image(unit) for unit in units]}
    weights = [unit.get("weight", 1.0) for unit in units]
    fields["controlnet_conditioning_scale"] = weights if len(weights) > 1 else weights[0]
    for ours, theirs, default in (
        ("control_guidance_start", "guidance_start", 0.0),
        ("control_guidance_end", "guidance_end", 1.0),
    ):
        values = [unit.get(theirs, default) for unit in units]
        if any(value != values[0] for value in values):
            raise UnsupportedError(
                f"alwayson_scripts.controlnet: {theirs} differs between units, which is not "
                "available. Send the same.",
                field="alwayson_scripts",
            )
        fields[ours] = values[0]
    sent_as = dict.fromkeys(fields, "alwayson_scripts.controlnet")
    return fields, sent_as


def _args(script: Any) -> list[Any]:
    args = script.get("args") if isinstance(script, Mapping) else script
    if isinstance(args, Mapping):
        args = list(args.values())
    return args if isinstance(args, list) else [] if is_empty(args) else [args]


def _is_on(unit: Any) -> bool:
    """Whether a unit has an effect: it is enabled and has an image or names a module or model."""
    if not isinstance(unit, Mapping):
        return bool(unit)
    is_enabled = str(unit.get("enabled", True)).lower() not in ("false", "0")
    names = (str(unit.get(name) or NOTHING).lower() for name in ("module", "model"))
    return is_enabled and (not is_empty(_source(unit)) or any(name != "none" for name in names))


def _unit(unit: Any) -> Mapping[str, Any]:
    if not isinstance(unit, Mapping):
        raise RequestError(
            f"alwayson_scripts.controlnet={shown(unit)} is not a unit. Send objects.",
            field="alwayson_scripts",
        )
    require_known(unit, UNIT)
    return {name: value for name, value in unit.items() if value is not None}


def _source(unit: Mapping[str, Any]) -> Any:
    image = unit.get("image")
    return unit.get("input_image") if is_empty(image) else image


def _image(unit: Mapping[str, Any]) -> Any:
    image = _source(unit)
    if isinstance(image, Mapping):
        require_known(image, {"image": DONE, "mask": refused("masks of units are not supported")})
        return image.get("image")
    return image
