"""The model table as a matrix of model types, backends and features, for `--list` and the
README.
"""

import json
from typing import Any

from backends import BACKEND_NAMES
from backends.files.generic import facts_of, why_not
from backends.files.modular import modular_calls
from backends.files.pipeline_calls import exported_pipelines, pipeline_call
from backends.model_table import FEATURES, ModelTable

MARKS = {"tested": "tested", "untested": "untested", "unsupported": "-"}
PREFERRED_ORDER = [name for name in BACKEND_NAMES if name != "single"]


def as_markdown(table: ModelTable, *, features: bool = False) -> str:
    """A row per model type, a column per backend; with features, a row per type and backend, a
    column per feature.
    """
    if not features:
        header = ["type", "model", "single", *PREFERRED_ORDER]
        rows = [
            [
                f"`{spec.name}`",
                spec.title,
                *(MARKS[spec.supports(backend).status] for backend in ("single", *PREFERRED_ORDER)),
            ]
            for spec in table.values()
        ]
    else:
        header = ["type", "backend", *FEATURES]
        rows = [
            [
                f"`{spec.name}`",
                backend,
                *(MARKS[spec.supports(backend, feature).status] for feature in FEATURES),
            ]
            for spec in table.values()
            for backend in spec.backends
        ]
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{counts(table)}" if features else text


def counts(table: ModelTable) -> str:
    """How many cells of types x backends x features have which status."""
    statuses = [
        spec.supports(backend, feature).status
        for spec in table.values()
        for backend in spec.backends
        for feature in FEATURES
    ]
    return (
        ", ".join(f"{statuses.count(status)} {status}" for status in MARKS)
        + f", {len(statuses)} cells in all"
    )


def classes_without_row(table: ModelTable) -> dict[str, dict[str, object]]:
    """Return the pipeline classes of the installed diffusers that no row runs -> what each makes
    and which request fields it takes, or why it cannot be asked.
    """
    with_row = {name for spec in table.values() for name in (spec.pipeline, *spec.also)}
    found: dict[str, dict[str, object]] = {}
    calls = {name: pipeline_call(name) for name in exported_pipelines() if name not in with_row}
    for name, call in (calls | modular_calls()).items():
        if call is not None:
            reason = why_not(call)
            makes, takes = facts_of(call)
            found[name] = {"refused": reason} if reason else {"makes": makes, "takes": takes}
    return found


def classes_as_markdown(table: ModelTable) -> str:
    """A row for each class without a row: it runs with --type=generic, or without --type."""
    rows = []
    for name, facts in classes_without_row(table).items():
        if "refused" in facts:
            rows.append([f"`{name}`", "-", str(facts["refused"]).replace("|", "or")])
        else:
            rows.append([f"`{name}`", str(facts["makes"]), ", ".join(facts["takes"])])
    lines = [["class", "makes", "fields of a request"], ["---"] * 3, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(table: ModelTable, *, with_classes: bool = False) -> str:
    """Everything: status and reason of each backend and feature; with_classes: and the classes that
    run without a row.
    """
    content: dict[str, Any] = {
        spec.name: {
            backend: {
                "status": row.cell.status,
                "reason": row.cell.reason,
                "features": {
                    name: {"status": cell.status, "reason": cell.reason}
                    for name, cell in row.features.items()
                },
            }
            for backend, row in spec.backends.items()
        }
        for spec in table.values()
    }
    if with_classes:
        content["classes"] = classes_without_row(table)
    return json.dumps(content, indent=2)
