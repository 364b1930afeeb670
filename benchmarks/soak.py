"""python -m benchmarks.soak --jobs=1000: find leaks after many images of mixed sizes.

Samples each rank's memory, open files and threads, and the number of processes below the launcher.
The slope is a straight line fitted to the memory after the first fifth of the jobs, in which caches
fill. Prints JSON.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.hosts.harness import RunningHost, start_launcher

SIDES = (64, 96, 128)
STEPS = (1, 2, 3, 4)
EVERY = 10
WARM_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument(
        "--give-up-at", type=Path, help="end early, with what was measured, once this file exists"
    )
    options = parser.parse_args()
    with start_launcher(
        "--type=sdxl",
        "--backend=distrifuser",
        f"--nproc_per_node={options.ranks}",
        "--keep_results=16",
    ) as host:
        host.wait_until_ready()
        print(json.dumps(run(host, options), indent=2))


def run(host: RunningHost, options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    host.post({"prompt": "a red circle", "num_inference_steps": 1}).raise_for_status()
    samples = [sample(host)]
    started = time.monotonic()
    done = 0
    while done < options.jobs and not (
        options.give_up_at is not None and options.give_up_at.exists()
    ):
        generate(host, chance, number=done)
        done += 1
        if done % EVERY == 0:
            samples.append(sample(host) | {"jobs": done})
        if done % 100 == 0:
            print(f"{done} jobs, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    seconds = time.monotonic() - started
    return {
        "jobs": done,
        "seconds": round(seconds, 1),
        "ranks": [of_rank(samples, rank) for rank in range(options.ranks)],
    } | {
        "processes": [samples[0]["processes"], samples[-1]["processes"]],
        "restarts": host.get("/settings").json()["restarts"],
    }


def generate(host: RunningHost, chance: random.Random, *, number: int) -> None:
    """Generate one image: every third through the job API, and every tenth of those cancelled."""
    body = {
        "prompt": f"a red circle {number}",
        "num_inference_steps": chance.choice(STEPS),
        "height": chance.choice(SIDES),
        "width": chance.choice(SIDES),
    }
    if number % 3:
        host.post(body, headers={"Accept": "image/png"}).raise_for_status()
        return
    sent = host.session.post(host.url("/v1/jobs"), json=body, timeout=60).json()
    if number % 30 == 0:
        host.session.delete(host.url(f"/v1/jobs/{sent['id']}"), timeout=60)
    while (state := host.get(f"/v1/jobs/{sent['id']}").json()["state"]) in ("queued", "running"):
        time.sleep(0.02)
    if state == "done":
        host.get(
            f"/v1/jobs/{sent['id']}/result", headers={"Accept": "image/png"}
        ).raise_for_status()


def sample(host: RunningHost) -> dict[str, Any]:
    ranks = {rank: facts(process) for rank, process in host.ranks().items()}
    return {"jobs": 0, "ranks": ranks, "processes": len(host.tree())}


def facts(process: psutil.Process) -> dict[str, int]:
    return {
        "memory": process.memory_info().rss,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def of_rank(samples: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return first and last value of each figure, and the slope of memory."""
    warm = [one for one in samples if one["jobs"] >= WARM_SHARE * samples[-1]["jobs"]]
    jobs = [one["jobs"] for one in warm]
    memory = [one["ranks"][rank]["memory"] / 1e6 for one in warm]
    slope = np.polyfit(jobs, memory, 1)[0] if len(warm) > 1 else 0.0
    first, last = samples[0]["ranks"][rank], samples[-1]["ranks"][rank]
    return {
        "rank": rank,
        "memory_mb": [round(first["memory"] / 1e6, 1), round(memory[0], 1), round(memory[-1], 1)],
        "memory_slope_mb_per_1000_jobs": round(1000 * float(slope), 2),
        "files": [first["files"], last["files"]],
        "threads": [first["threads"], last["threads"]],
    }


if __name__ == "__main__":
    main()
