"""Defaults that follow from the checkpoint: distilled and few-step ones have their own in the model
table. Imports no torch.

A checkpoint is recognised by its configuration where that differs, else by words in its names: of
the repository, file or folder, and in the file's metadata.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from backends.files.checkpoint import Checkpoint, read_json
from backends.model_table import CHECKPOINT_SIGNS, ModelSpec

TITLES = ("modelspec.title", "modelspec.architecture", "general.name", "ss_output_name")
"""Metadata in which trainers and publishers write a model's name."""


def with_own_defaults(
    spec: ModelSpec, checkpoint: Checkpoint, names: Iterable[str]
) -> tuple[ModelSpec, str]:
    """Return the type with the defaults of this checkpoint, and why they are others; '' if not.

    names: of the checkpoint and of the files that replace its denoiser, without their folders.
    """
    metadata = checkpoint.header.metadata if checkpoint.header is not None else {}
    own_name = checkpoint.index.get("_name_or_path")
    texts = [*names, *(metadata.get(key, "") for key in TITLES)]
    words = "".join(_plain(text) for text in (*texts, own_name) if isinstance(text, str))
    for title, row in spec.checkpoints.items():
        if not _is_one(row, checkpoint, words):
            continue
        facts = {key: value for key, value in row.items() if key not in CHECKPOINT_SIGNS}
        if (steps := re.search(r"-(\d{1,2})-?steps?(?=-)", words)) and "words" in row:
            facts["num_inference_steps"] = int(steps[1])
        typed = {
            key: MappingProxyType(value)
            if isinstance(value, dict)
            else type(getattr(spec, key))(value)
            for key, value in facts.items()
        }
        told = ", ".join(f"{key}={value}" for key, value in facts.items())
        return replace(spec, **typed), f"{told}: the checkpoint is {title}"
    return spec, ""


def _is_one(row: Mapping[str, Any], checkpoint: Checkpoint, words: str) -> bool:
    """Return whether the configuration, or a word in the names, is this row's."""
    if "is" in row:
        return all(_field(checkpoint, path) == value for path, value in row["is"].items())
    return any(f"-{word}" in words for word in row["words"])


def _field(checkpoint: Checkpoint, path: str) -> Any:
    component, _, key = path.rpartition(".")
    if not component:
        return checkpoint.index.get(key)
    folder = checkpoint.folder / component
    if component == "scheduler" and (folder / "scheduler_config.json").is_file():
        return read_json(folder / "scheduler_config.json").get(key)
    return checkpoint.config(component).get(key)


def _plain(text: str) -> str:
    """'dreamshaperXL_Lightning.v1' -> '-dreamshaper-xl-lightning-v1-'."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", text)
    return f"-{re.sub(r'[^a-z0-9]+', '-', parts.lower())}-"
