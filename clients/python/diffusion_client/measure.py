"""diffusion-launcher measure --url http://127.0.0.1:6000

Lets a host time its methods and compare an image of each with one rank's. Jobs wait meanwhile.
"""

import argparse
import json
import sys
from typing import Any

from diffusion_client import Client, HostError

EXIT_USER_ERROR = 2
WITHIN_S = 3600.0


def main(argv: list[str]) -> int:
    """Return 0 once the table is shown, or 2 with one line if the host refuses."""
    options = _parser().parse_args(argv)
    try:
        client = Client(options.url, api_key=options.api_key, timeout_s=WITHIN_S)
        found = client.measure()
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(json.dumps(found, indent=2) if options.json else _as_text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusion-launcher measure",
        description="How fast a host's methods are, and how close their images to one GPU's.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:6000", help="of the host")
    parser.add_argument("--api_key", help="if it wants one")
    parser.add_argument("--json", action="store_true", help="everything there is, as JSON")
    return parser


def _as_text(found: dict[str, Any]) -> str:
    """Return a line for each method that was timed: dB against one rank, and seconds."""
    lines = [f"{'method':52} quality      dB  s/image"]
    for row in found["table"]:
        if row.get("measured_step_s") is None:
            continue
        decibels = row.get("closeness_db")
        shown = "same" if row["quality"] == "exact" else "-" if decibels is None else decibels
        lines.append(f"{row['method']:52} {row['quality']:7} {shown:>7}  {row['image_s']:.4g}")
    lines += [f"{level}: {method}" for level, method in found["levels"].items()]
    return "\n".join(lines)
