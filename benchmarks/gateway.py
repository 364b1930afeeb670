"""Cost and behaviour of the --engine=ray gateway with two demo replicas. Prints JSON.

    python -m benchmarks.gateway [--requests 20] [--jobs 20] [--steps 12] [--size 128]

1. Milliseconds that the gateway adds to a small image, sent in turns to it and to a host of its
own: the difference of the medians. 2. How many of `--jobs` jobs, sent at once, each replica does.
3. One replica's launcher is killed (SIGKILL) in the middle of `--jobs` jobs: jobs that are lost,
seconds until the replica's job is started
   again, and until there are two replicas again. Every image is compared with the earlier one of
   the same seed.
4. One replica, two at most: seconds until a burst of jobs has brought the second, and until
idleness has taken one away. Needs two free cores, and about 5 GB.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "clients" / "python"))

from diffusion_client import Client, HostError  # noqa: E402  found by the line above

WITHIN_S = 300
IDLE_S = 5
PROMPT = "a red circle on a blue background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--port", type=int, default=6191)
    options = parser.parse_args()
    body = {
        "prompt": PROMPT,
        "num_inference_steps": options.steps,
        "height": options.size,
        "width": options.size,
    }
    figures: dict[str, Any] = dict(vars(options))
    with started(options.port, "--engine=ray", "--replicas=2") as gateway:
        wait_until(lambda: num_ready(gateway) == 2)
        with started(options.port + 1) as host:
            wait_until(lambda: host.health()["phase"] == "ready")
            figures["overhead"] = report_progress(overhead(gateway, host, options.requests))
        figures["routing"], images = routing(gateway, body, options.jobs)
        figures["kill"] = kill(gateway, body, images)
        report_progress([figures["routing"], figures["kill"]])
    with started(
        options.port,
        "--engine=ray",
        "--min_replicas=1",
        "--max_replicas=2",
        f"--idle_seconds={IDLE_S}",
    ) as gateway:
        wait_until(lambda: num_ready(gateway) == 1)
        figures["scaling"] = scaling(gateway, body, options.jobs)
    print(json.dumps(figures, indent=2))


def report_progress(figures: Any) -> Any:
    """Print figures so far on stderr, since the run takes minutes."""
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def overhead(gateway: Client, host: Client, number: int) -> dict[str, float]:
    """Return medians over `number` requests each, in turns, after warm-up requests."""
    body = {"prompt": PROMPT, "num_inference_steps": 1, "height": 64, "width": 64, "seed": 1}

    def seconds(client: Client) -> float:
        begun = time.perf_counter()
        client.open("/generate", method="POST", body=body, accept="image/png")
        return time.perf_counter() - begun

    for client in (gateway, gateway, gateway, gateway, host, host):
        seconds(client)
    turns = [(seconds(host), seconds(gateway)) for _ in range(number)]
    direct, through = (statistics.median(each) * 1000 for each in zip(*turns, strict=True))
    return {
        "direct_ms": round(direct, 1),
        "gateway_ms": round(through, 1),
        "added_ms": round(through - direct, 1),
    }


def routing(
    gateway: Client, body: dict[str, Any], number: int
) -> tuple[dict[str, Any], list[bytes]]:
    """Return each replica's share of jobs that were sent at once, and their images by seed."""
    before = done(gateway)
    begun = time.perf_counter()
    jobs = [gateway.submit(**body, seed=seed) for seed in range(number)]
    for job in jobs:
        job.wait()
    seconds = time.perf_counter() - begun
    shares = {name: count - before[name] for name, count in done(gateway).items()}
    uneven = max(abs(share / (number / len(shares)) - 1) for share in shares.values())
    figures = {
        "done": shares,
        "uneven_percent": round(100 * uneven, 1),
        "jobs_per_second": round(number / seconds, 3),
    }
    return figures, [job.result() for job in jobs]


def kill(gateway: Client, body: dict[str, Any], images: list[bytes]) -> dict[str, Any]:
    """Kill a replica during jobs. A job is lost if it ends in anything but its image."""
    before = sum(done(gateway).values())
    jobs = [gateway.submit(**body, seed=seed) for seed in range(len(images))]
    wait_until(
        lambda: sum(done(gateway).values()) >= before + len(images) // 4 and all(busy(gateway))
    )
    victim = replicas(gateway)[0]
    (hit,) = victim["jobs"]
    os.kill(victim["pid"], signal.SIGKILL)
    begun = time.perf_counter()
    wait_until(
        lambda: is_begun_elsewhere(gateway, hit, victim["name"]) or gateway.job(hit).state.is_over
    )
    again_s = time.perf_counter() - begun
    lost = [
        seed for seed, job in enumerate(jobs) if not is_done(job) or job.result() != images[seed]
    ]
    wait_until(lambda: num_ready(gateway) == 2)
    return {
        "lost": len(lost),
        "job_begun_again_s": round(again_s, 2),
        "two_replicas_again_s": round(time.perf_counter() - begun, 1),
    }


def scaling(gateway: Client, body: dict[str, Any], number: int) -> dict[str, Any]:
    begun = time.perf_counter()
    jobs = [gateway.submit(**body, seed=seed) for seed in range(number)]
    wait_until(lambda: len(replicas(gateway)) == 2)
    asked_s = time.perf_counter() - begun

    def is_second_ready() -> bool:
        """Whether the second replica is ready while the load goes on. A superfluous one never
        is.
        """
        if gateway.cluster()["deployments"][0]["waiting"] < number // 2:
            jobs.append(gateway.submit(**body, seed=len(jobs)))
        return num_ready(gateway) == 2

    wait_until(is_second_ready)
    ready_s = time.perf_counter() - begun
    for job in jobs:
        job.wait()
    begun = time.perf_counter()
    wait_until(lambda: len(replicas(gateway)) == 1)
    seconds = {
        "second_asked_for_s": asked_s,
        "second_ready_s": ready_s,
        "one_again_s": time.perf_counter() - begun,
    }
    return {"idle_seconds": IDLE_S, **{name: round(value, 1) for name, value in seconds.items()}}


def is_done(job: Any) -> bool:
    try:
        return job.wait().state == "done"
    except HostError:
        return False


def is_begun_elsewhere(gateway: Client, job_id: str, victim: str) -> bool:
    return any(
        job_id in replica["jobs"] for replica in replicas(gateway) if replica["name"] != victim
    )


def replicas(gateway: Client) -> list[dict[str, Any]]:
    return gateway.cluster()["deployments"][0]["replicas"]


def num_ready(gateway: Client) -> int:
    return sum(replica["state"] == "ready" for replica in replicas(gateway))


def done(gateway: Client) -> dict[str, int]:
    return {replica["name"]: replica["done"] for replica in replicas(gateway)}


def busy(gateway: Client) -> list[bool]:
    return [bool(replica["jobs"]) for replica in replicas(gateway)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(HostError):  # not listening yet
            if condition():
                return
        time.sleep(0.05)
    sys.exit(f"not within {WITHIN_S} s")


@contextlib.contextmanager
def started(port: int, *arguments: str) -> Iterator[Client]:
    """Start a launcher with the demo model for the block.

    Its log is shown if it ends early.
    """
    command = [
        sys.executable,
        str(ROOT / "launcher.py"),
        "--type=sdxl",
        f"--port={port}",
        *arguments,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield Client(f"http://127.0.0.1:{port}", uses_proxies=False)
        finally:
            if process.poll() is not None:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))
            process.terminate()
            process.wait(timeout=30)


if __name__ == "__main__":
    main()
