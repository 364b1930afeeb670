"""`make demo`: start two ranks with the demo model, ask for one image over HTTP, write it, and keep
serving.

Uses the launcher and the HTTP API as any user would; the standard library is enough.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT = "a red circle on a blue background"
READY_WITHIN_S = 300
POLL_S = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--port", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "demo.png")
    parser.add_argument("--once", action="store_true", help="exit after the image")
    options = parser.parse_args()
    address = f"http://127.0.0.1:{options.port}"
    # one method by name: for so small a model on a busy machine, measuring might find that one rank
    # is as quick
    method = ("--backend=distrifuser", "--nproc_per_node=2")
    command = [
        sys.executable,
        str(REPOSITORY / "launcher.py"),
        "--type=sdxl",
        *method,
        f"--port={options.port}",
    ]
    # its own session, so that Ctrl-C reaches the host once, through us
    host = subprocess.Popen(command, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        wait_until_ready(address, host)
        started = time.perf_counter()
        image = fetch_image(address, PROMPT)
        print(f'"{PROMPT}" drawn by two ranks in {time.perf_counter() - started:.1f} s')
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(image)
        print(f"image: {options.out}\naddress: {address}")
        if options.once:
            return 0
        print("serving; Ctrl-C ends it", flush=True)
        return host.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if host.poll() is None:
            host.terminate()
            host.wait()


def wait_until_ready(address: str, host: subprocess.Popen[bytes]) -> None:
    """Poll /initialize until it answers 200. Exits if the host ends before, or is not ready in
    time.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if host.poll() is not None:
            sys.exit(host.returncode or 1)
        try:
            with urllib.request.urlopen(f"{address}/initialize", timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass  # not listening yet
        time.sleep(POLL_S)
    sys.exit(f"the host was not ready within {READY_WITHIN_S} s")


def fetch_image(address: str, prompt: str) -> bytes:
    """One image as PNG."""
    body = json.dumps({"prompt": prompt, "seed": 1}).encode()
    headers = {"Content-Type": "application/json", "Accept": "image/png"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/generate", body, headers)
        ) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        sys.exit(f"the host answered {error.code}: {json.load(error)['message']}")


if __name__ == "__main__":
    sys.exit(main())
