"""The pipeline configuration of POST /apply (v2 protocol, docs/compat.md) -> Settings. No torch.

Every value is used or refused with a reason. Only values that cannot change an image are ignored,
with a warning in the log.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backends.errors import ConfigError
from backends.model_table import ModelSpec, ModelTable
from hosts.launch.settings import Settings

logger = logging.getLogger(__name__)

Values = dict[str, Any]

PLAIN = (
    "lora",
    "enable_vae_tiling",
    "enable_vae_slicing",
    "enable_attention_slicing",
    "xformers_efficient",
)
"""Keys with the same name as our arguments."""
BACKEND_CONFIG = ("model_n", "stride", "time_shift", "synced_steps", "synced_percent")
TORCH_CONFIG = ("torch_cache_limit", "torch_accumlated_cache_limit", "torch_capture_scalar")
COMPILE_CONFIG = (
    "compile_transformer",
    "compile_vae",
    "compile_encoder",
    "compile_backend",
    "compile_mode",
    "compile_options",
)
SECTIONS = {
    "backend_config": BACKEND_CONFIG,
    "torch_config": TORCH_CONFIG,
    "compile_config": COMPILE_CONFIG,
}
NAMES = {
    "synced_steps": "warmup_steps",
    "compile_transformer": "compile_unet",
    "compile_encoder": "compile_text_encoder",
    "torch_accumlated_cache_limit": "torch_accumulated_cache_limit",
}
"""The client's name -> our argument, where they differ."""
MOTION = {"motion_module": "motion_module", "motion_adapter": "motion_adapter"}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
QUANTIZED = {
    "transformer": "quantize_unet_to",
    "encoder": "quantize_encoder_to",
    "vae": "quantize_vae",
    "misc": "quantize_misc_to",
}
VARIANTS = ("variant", "infer_dtype")
SHORT_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "uint8": "int8"}
OFF_TEXTS = ("", "default", "disabled", "None")


def read_configuration(body: Mapping[str, Any], *, base: Settings, table: ModelTable) -> Settings:
    """Return `base` (port, backend, ...) with the pipeline of the body.

    ConfigError names the key at fault.
    """
    name = _text(body, "pipeline_type")
    spec = table[name]
    values = {
        "type": spec.name,
        "checkpoint": _text(_mapping(body, "checkpoint"), "checkpoint"),
        **_variant(body),
        **{key: body[key] for key in PLAIN if not _is_off(body.get(key))},
        **_sections(body),
        **_components(body, spec),
        **_quantization(body),
    }
    if _mapping(body, "group_offload_config"):
        values["enable_group_offload"] = True
    _warn_of_others(body)
    parsed = Settings.from_values({NAMES.get(key, key): value for key, value in values.items()})
    return replace(
        base, **{NAMES.get(key, key): getattr(parsed, NAMES.get(key, key)) for key in values}
    )


def _sections(body: Mapping[str, Any]) -> Values:
    """Return the settings of the nested objects.

    In compile_config, `fullgraph` is the inverse of ours.
    """
    found: Values = {}
    for section, keys in SECTIONS.items():
        given = _mapping(body, section)
        found |= {key: given[key] for key in keys if not _is_off(given.get(key))}
    if "time_shift" in found:
        found["time_shift"] = bool(found["time_shift"])
    compiled = _mapping(body, "compile_config")
    if compiled.get("compile_fullgraph_off") or compiled.get("fullgraph") is False:
        found["compile_fullgraph_off"] = True
    return found


def _variant(body: Mapping[str, Any]) -> Values:
    for key in VARIANTS:
        if not _is_off(body.get(key)):
            return {"variant": SHORT_DTYPES.get(body[key], body[key])}
    return {}


def _components(body: Mapping[str, Any], spec: ModelSpec) -> Values:
    """Return weights that replace the checkpoint's: each a folder, or a file and its
    config.json.
    """
    for key in ENCODERS:
        if _mapping(body, key):
            raise ConfigError(
                f"{key} was given, but separate text encoders are not available. Put it into the "
                "checkpoint's folder."
            )
    found: Values = {}
    for key, ours in (("transformer", spec.denoiser), ("vae", "vae"), *MOTION.items()):
        path, config = _weights(body, key)
        found |= {ours: path} if path else {}
        found |= (
            {"motion_config" if key in MOTION else f"{ours}_config": config}
            if path and config
            else {}
        )
    for key in ("control_net", "ip_adapter"):
        path, config = _weights(body, key)
        found |= {key: {path: 1.0}} if path else {}
        found |= {"control_net_config": config} if path and config and key == "control_net" else {}
    return found


def _weights(body: Mapping[str, Any], key: str) -> tuple[str | None, str | None]:
    """Return the path and the path of its configuration.

    given: {"checkpoint": folder} or {"model": file, "config": config.json}.
    """
    given = _mapping(body, key)
    path = given.get("checkpoint") or given.get("model")
    if given and not isinstance(path, str):
        raise ConfigError(
            f'{key} must be {{"checkpoint": folder}} or {{"model": file, "config": json}}, not '
            f"{str(dict(given))[:80]}."
        )
    return path, given.get("config") or None


def _quantization(body: Mapping[str, Any]) -> Values:
    """Return component -> the text of our option.

    The libraries' finer settings have no counterpart here.
    """
    found: Values = {}
    for target, given in _mapping(body, "quantization_config").items():
        if _is_off(given) or not given:
            continue
        if target not in QUANTIZED:
            logger.warning(
                "quantization_config.%s has no effect: there are no weights in it", target
            )
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"quantization_config.{target} must be an object, not {type(given).__name__}."
            )
        found[QUANTIZED[target]] = _quantization_text(given, f"quantization_config.{target}")
    return found


def _quantization_text(given: Mapping[str, Any], where: str) -> str:
    library, kind = given.get("backend"), given.get("quant_type")
    if library == "quanto" and isinstance(kind, str):
        return kind
    if library == "torchao" and isinstance(kind, str):
        return f"tao,{kind}"
    if library == "bitsandbytes" and given.get("load_in_8bit"):
        return "bnb,int8"
    if library == "bitsandbytes" and given.get("load_in_4bit"):
        compute = (
            SHORT_DTYPES.get(
                given.get("bnb_4bit_compute_dtype"), given.get("bnb_4bit_compute_dtype")
            )
            or "bf16"
        )
        storage = (
            SHORT_DTYPES.get(
                given.get("bnb_4bit_quant_storage"), given.get("bnb_4bit_quant_storage")
            )
            or "int8"
        )
        return f"bnb,int4,{compute},{storage},{given.get('bnb_4bit_quant_type') or 'nf4'}"
    raise ConfigError(
        f"{where} asks for {library!r} ({kind!r}), which is not available. Allowed: quanto, "
        "torchao and bitsandbytes."
    )


def _warn_of_others(body: Mapping[str, Any]) -> None:
    read = {
        "pipeline_type",
        "checkpoint",
        "quantization_config",
        "group_offload_config",
        "control_net",
        "ip_adapter",
        "transformer",
        "vae",
    }
    known = read | set(PLAIN) | set(SECTIONS) | set(VARIANTS) | set(MOTION) | set(ENCODERS)
    for key in sorted(
        key
        for key, value in body.items()
        if key not in known and not _is_off(value) and value != {}
    ):
        logger.warning("%s has no effect on this host: ignored", key)


def _is_off(value: Any) -> bool:
    """Whether the client chose nothing. 0 is a choice."""
    return (
        value is None
        or value is False
        or value == {}
        or (isinstance(value, str) and value in OFF_TEXTS)
    )


def _mapping(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = body.get(key)
    if _is_off(value):
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be an object, not {type(value).__name__}.")
    return value


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{key} is missing or no text. Send it with the pipeline's configuration."
        )
    return value
