"""diffusion-launcher status --url http://127.0.0.1:6000

Shows the replicas of a gateway, or the health of a single host.
"""

import argparse
import json
import sys
from typing import Any

from diffusion_client import Client, HostError

EXIT_USER_ERROR = 2
COLUMNS = ("name", "state", "node", "ranks", "jobs", "done", "reason")


def main(argv: list[str]) -> int:
    """Return 0 once the status is shown, or 2 with one line if there is no answer."""
    options = _parser().parse_args(argv)
    try:
        client = Client(options.url, api_key=options.api_key, timeout_s=20)
        found = client.cluster()
        text = (
            json.dumps(found, indent=2)
            if options.json
            else _as_text(found)
            if "deployments" in found
            else _as_lines(found)
        )
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusion-launcher status", description="What runs behind an address."
    )
    parser.add_argument("--url", default="http://127.0.0.1:6000", help="of the gateway or host")
    parser.add_argument("--api_key", help="if it wants one")
    parser.add_argument("--json", action="store_true", help="everything there is, as JSON")
    return parser


def _as_lines(host: dict[str, Any]) -> str:
    return "\n".join(f"{name:10} {value}" for name, value in host.items())


def _as_text(cluster: dict[str, Any]) -> str:
    return "\n\n".join(_model(deployment) for deployment in cluster["deployments"])


def _model(deployment: dict[str, Any]) -> str:
    """Return a line for the model and a table of its replicas."""
    counts = (
        f"{deployment['target']} replicas wanted ({deployment['min_replicas']} to "
        f"{deployment['max_replicas']})"
    )
    head = (
        f"{deployment['model']} (type {deployment['type']}): {deployment['phase']}, {counts}, "
        f"{deployment['waiting']} jobs wait, {deployment['lost']} replicas lost"
    )
    rows = [
        COLUMNS,
        *(tuple(_cell(replica[name]) for name in COLUMNS) for replica in deployment["replicas"]),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n  ".join([head, *lines])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return str(len(value))
    return "-" if value is None else str(value)
