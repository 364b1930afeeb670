"""The model table as a matrix of model types, backends and features, for `--list` and the README."""

import json

from backends import BACKEND_NAMES
from backends.model_table import FEATURES, ModelTable

MARKS = {"tested": "tested", "untested": "untested", "unsupported": "-"}
PREFERRED_ORDER = [name for name in BACKEND_NAMES if name != "single"]


def as_markdown(table: ModelTable, *, features: bool = False) -> str:
    """A row per model type, a column per backend; with features, a row per type and backend, a column per feature."""
    if not features:
        header = ["type", "model", "single", *PREFERRED_ORDER]
        rows = [
            [f"`{spec.name}`", spec.title, *(MARKS[spec.supports(backend).status] for backend in ("single", *PREFERRED_ORDER))]
            for spec in table.values()
        ]
    else:
        header = ["type", "backend", *FEATURES]
        rows = [
            [f"`{spec.name}`", backend, *(MARKS[spec.supports(backend, feature).status] for feature in FEATURES)]
            for spec in table.values()
            for backend in spec.backends
        ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(table: ModelTable) -> str:
    """Everything: status and reason of each backend and feature."""
    content = {
        spec.name: {
            backend: {
                "status": row.cell.status,
                "reason": row.cell.reason,
                "features": {name: {"status": cell.status, "reason": cell.reason} for name, cell in row.features.items()},
            }
            for backend, row in spec.backends.items()
        }
        for spec in table.values()
    }
    return json.dumps(content, indent=2)
