"""Throughput and latency of two ranks against one, and of --mode=auto against --mode=latency.

    python benchmarks/throughput.py [--jobs 12] [--rounds 3] [--alone 5] [--steps 12] [--size 256]
        [--backend distrifuser]

Starts four real hosts with the demo model, each rank with one thread: one rank that runs one image
after the other (--max_batch=1); one rank that batches; two ranks; two ranks with --mode=latency.
Only one of them works at a time. Prints JSON: jobs per second for `--jobs` jobs sent at once to
each of the first three, in turns, and the median seconds of jobs sent singly, in turns, to the
hosts of two ranks. `times_faster` is two ranks over one that makes one image after the other,
`times_faster_than_batching` over one that batches: medians of the rounds; `by_cpu` is what two
cores would give that are wholly the ranks' own: twice the CPU seconds of a job on one rank over
those of a job on two. Needs two free cores, and about 5 GB.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
READY_WITHIN_S = 300
AT_ONCE = ("one", "one_batching", "auto")
WARM_BURSTS = 2
POLL_S = 0.2
"""Interval between status requests during a burst: each costs rank 0 a millisecond."""


class Host:
    """A host that answers at this port. `body`: fields of its jobs except for the seed."""

    def __init__(self, port: int, body: dict[str, Any], launcher: int) -> None:
        """launcher: its process id."""
        self.url = f"http://127.0.0.1:{port}"
        self._body = body
        self._launcher = psutil.Process(launcher)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if self.get("/healthz")["phase"] == "ready":
                    return
            time.sleep(0.2)
        sys.exit(f"{self.url} was not ready in time")

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path) as answer:
            return json.load(answer)

    def send(self, seed: int) -> str:
        body = json.dumps({**self._body, "seed": seed}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/jobs", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["id"]

    def wait(self, job: str) -> dict[str, Any]:
        while (shown := self.get(f"/v1/jobs/{job}"))["state"] in ("queued", "running"):
            time.sleep(POLL_S)
        assert shown["state"] == "done", shown
        return shown

    def burst(self, count: int) -> dict[str, Any]:
        """Send `count` jobs at once and wait for them."""
        cpu_before, started = self._cpu_seconds(), time.perf_counter()
        jobs = [self.send(seed) for seed in range(count)]
        done = [self.wait(job) for job in jobs]
        seconds = time.perf_counter() - started
        return {
            "seconds": round(seconds, 3),
            "jobs_per_second": round(count / seconds, 4),
            "cpu_seconds_per_job": round((self._cpu_seconds() - cpu_before) / count, 4),
            "ranks_and_batch_of_each_job": [f"{job['ranks']} x {job['batch']}" for job in done],
        }

    def _cpu_seconds(self) -> float:
        """CPU seconds of the launcher and its ranks."""
        processes = [self._launcher, *self._launcher.children(recursive=True)]
        return sum(
            times.user + times.system for times in (process.cpu_times() for process in processes)
        )

    def alone(self, seed: int) -> float:
        """Return the seconds of one image, from request to result."""
        body = json.dumps({**self._body, "seed": seed}).encode()
        request = urllib.request.Request(
            f"{self.url}/generate",
            body,
            {"Content-Type": "application/json", "Accept": "image/png"},
        )
        started = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            answer.read()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--backend", default="distrifuser")
    parser.add_argument("--port", type=int, default=6091)
    options = parser.parse_args()
    body = {
        "prompt": "a red circle on a blue background",
        "num_inference_steps": options.steps,
        "height": options.size,
        "width": options.size,
    }
    two = ("--type=sdxl", "--nproc_per_node=2", f"--backend={options.backend}")
    one = ("--type=sdxl", "--nproc_per_node=1")
    kinds = {
        "one": (*one, "--max_batch=1"),
        "one_batching": one,
        "auto": two,
        "latency": (*two, "--mode=latency"),
    }
    with contextlib.ExitStack() as stack:
        hosts = {}
        for number, (name, arguments) in enumerate(kinds.items()):
            hosts[name] = stack.enter_context(started(options.port + number, body, *arguments))
            hosts[name].alone(0)  # the first image includes first-use costs
        for name in AT_ONCE:
            for _ in range(WARM_BURSTS):  # to learn which batches are worthwhile
                hosts[name].burst(options.jobs)
        rounds = [
            {name: hosts[name].burst(options.jobs) for name in AT_ONCE}
            for _ in range(options.rounds)
        ]
        turns = [
            (hosts["auto"].alone(seed), hosts["latency"].alone(seed))
            for seed in range(options.alone)
        ]
    seconds = {
        name: statistics.median(times)
        for name, times in zip(("auto", "latency"), zip(*turns, strict=True), strict=True)
    }
    figures = {
        "jobs": options.jobs,
        **{name: getattr(options, name) for name in ("steps", "size", "backend")},
        "at_once": {
            "times_faster": _faster(rounds, "one", "seconds"),
            "times_faster_by_cpu": round(2 * _faster(rounds, "one", "cpu_seconds_per_job"), 3),
            "times_faster_than_batching": _faster(rounds, "one_batching", "seconds"),
            "times_faster_than_batching_by_cpu": round(
                2 * _faster(rounds, "one_batching", "cpu_seconds_per_job"), 3
            ),
            "rounds": rounds,
        },
        "one_at_a_time": {
            **{f"{name}_seconds": round(value, 3) for name, value in seconds.items()},
            "auto_over_latency": round(seconds["auto"] / seconds["latency"], 3),
        },
    }
    print(json.dumps(figures, indent=2))


def _faster(rounds: list[dict[str, Any]], than: str, what: str) -> float:
    return round(statistics.median(turn[than][what] / turn["auto"][what] for turn in rounds), 3)


@contextlib.contextmanager
def started(port: int, body: dict[str, Any], *arguments: str) -> Iterator[Host]:
    """Start a host that is ready to use."""
    command = [sys.executable, str(ROOT / "launcher.py"), f"--port={port}", *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            host = Host(port, body, process.pid)
            host.wait_until_ready()
            yield host
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
