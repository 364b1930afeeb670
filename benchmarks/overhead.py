"""Overhead of the server: seconds of POST /generate over HTTP minus those of the pipeline call.

    python benchmarks/overhead.py [--requests 20] [--steps 4]

Starts a real host with the demo model and prints JSON. The pipeline's seconds are measured
on rank 0 around call and decoding. The rest is HTTP, queue, broadcast, outcome exchange
and encoding (as PNG, and as the JSON of the existing clients).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_WITHIN_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--port", type=int, default=6090)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}"
    command = [
        sys.executable,
        str(ROOT / "launcher.py"),
        "--type=sdxl",
        f"--port={options.port}",
        f"--nproc_per_node={options.ranks}",
    ]
    host = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(url)
        ask(url, options.steps, "image/png")  # the first image includes first-use costs
        kinds = {"png": "image/png", "json": "application/json"}
        result = {
            kind: measure(url, options.requests, options.steps, accept)
            for kind, accept in kinds.items()
        }
        print(
            json.dumps(
                {
                    "requests": options.requests,
                    "steps": options.steps,
                    "ranks": options.ranks,
                    **result,
                },
                indent=2,
            )
        )
    finally:
        host.terminate()
        host.wait()


def measure(url: str, count: int, steps: int, accept: str) -> dict[str, float]:
    """Return milliseconds: medians of the request, of the pipeline in it, and of the difference."""
    whole, inside = [], []
    for _ in range(count):
        started = time.perf_counter()
        ask(url, steps, accept)
        whole.append(time.perf_counter() - started)
        inside.append(json.loads(fetch(f"{url}/settings"))["last_report"]["seconds"])
    overhead = [one - two for one, two in zip(whole, inside, strict=True)]
    named = {"request_ms": whole, "pipeline_ms": inside, "overhead_ms": overhead}
    return {name: round(1000 * statistics.median(values), 2) for name, values in named.items()}


def ask(url: str, steps: int, accept: str) -> bytes:
    body = json.dumps(
        {"prompt": "a red circle on a blue background", "seed": 1, "num_inference_steps": steps}
    ).encode()
    request = urllib.request.Request(
        f"{url}/generate", body, {"Content-Type": "application/json", "Accept": accept}
    )
    return fetch(request)


def fetch(what: str | urllib.request.Request) -> bytes:
    with urllib.request.urlopen(what) as answer:
        return answer.read()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/initialize") as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass  # not listening yet
        time.sleep(0.2)
    sys.exit("the host was not ready in time")


if __name__ == "__main__":
    main()
