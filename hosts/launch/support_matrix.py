"""The model table as a matrix of model types, backends and features, for `--list` and the
README.
"""

import json

from backends import BACKEND_NAMES
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


def as_json(table: ModelTable) -> str:
    """Everything: status and reason of each backend and feature."""
    content = {
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
    return json.dumps(content, indent=2)
