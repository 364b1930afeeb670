"""Command lines of existing clients -> the launcher's Settings.

Parsing is lenient, because neither client notices a host that exits. Unknown arguments only cause a
warning, empty values count as absent, '-' and '_' are equal, and there are no abbreviations. An
invalid value is a ConfigError, which the host then returns for every request.
"""

import logging
import tempfile
from collections.abc import Sequence

from backends.errors import ConfigError
from hosts.launch.settings import Settings, canonical_names, options

logger = logging.getLogger(__name__)

OFF_VALUES = frozenset({"", "none", "disabled", "default", "null"})
"""Texts by which clients say that nothing was chosen."""
_NO_WEIGHTS = "there are no weights in it"
NO_EFFECT = {
    "quantize_tokenizer": _NO_WEIGHTS,
    "quantize_scheduler": _NO_WEIGHTS,
    "max_sequence_length": "prompts may be as long as the pipeline allows",
    "vae_parallel_size": "an image is decoded by all ranks together, or whole by each",
    "no_cuda_graph": "no CUDA graphs are used",
    "use_teacache": "it needs coefficients fitted to each model; use --step_cache=first_block",
    "use_fast_attn": "it needs a calibration for each model",
    "use_fp8_t5_encoder": "text encoders are quantized by --quantize_encoder_to=float8",
    "no_use_resolution_binning": "sizes are never changed to those of a list",
}
"""Arguments of the existing clients without effect here -> reason."""
MEANT_FOR = {"warm_up": "asyncdiff", "synced_steps": "asyncdiff", "warmup_steps": "xdit"}
"""Arguments that apply to one backend only when these clients send them."""
OLD_SWITCHES = frozenset(name for name in NO_EFFECT if name.startswith(("no_", "use_")))


def parse_client_arguments(argv: Sequence[str], *, backend: str) -> Settings:
    """Return the settings for a host script of `backend`.

    Requests may name image files in the system's temporary folder, as LocalAI does.
    """
    names = canonical_names()
    values: dict[str, str] = {}
    for spelling, value in _pairs(argv):
        if spelling in NO_EFFECT:
            logger.warning("--%s has no effect: %s", spelling, NO_EFFECT[spelling])
            continue
        if spelling not in names:
            logger.warning("--%s is not an argument of this host: ignored", spelling)
            continue
        if MEANT_FOR.get(spelling, backend) != backend:
            logger.warning(
                "--%s has no effect: it is for backend %s", spelling, MEANT_FOR[spelling]
            )
            continue
        name = names[spelling]
        text = "true" if value is None and _is_switch(name) else value
        if text is not None and text.strip().lower() not in OFF_VALUES:
            values[name] = text
    return Settings.from_values({"image_dirs": tempfile.gettempdir(), **values, "backend": backend})


def _pairs(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Parse --key=value, --key value and bare --key. Anything else causes a warning."""
    pairs: list[tuple[str, str | None]] = []
    for token in argv:
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            pairs.append((key.replace("-", "_"), value if equals else None))
        elif (
            pairs
            and pairs[-1][1] is None
            and not _is_switch(canonical_names().get(pairs[-1][0], pairs[-1][0]))
        ):
            pairs[-1] = (pairs[-1][0], token)
        else:
            logger.warning("%r is not an argument of this host: ignored", token)
    return pairs


def _is_switch(name: str) -> bool:
    return name in OLD_SWITCHES or (name in options() and options()[name].is_switch)


def settings_or_problem(
    argv: Sequence[str], *, backend: str
) -> tuple[Settings, ConfigError | None]:
    """Return the settings and None, or on a ConfigError those of a host that only reports it.

    That host listens on the port that the client asked for.
    """
    try:
        return parse_client_arguments(argv, backend=backend), None
    except ConfigError as error:
        kept = [f"--{name}={value}" for name, value in _pairs(argv) if name in ("port", "type")]
        try:
            return parse_client_arguments(kept, backend=backend), error
        except ConfigError:
            return Settings(backend=backend), error
