"""python -m benchmarks.chaos --rounds=100: break a host of two ranks under load and count losses.

Each round strikes at a random moment (idle, in a step, in a decode, while the host loads after the
round before). One rank: SIGKILL, also again while the host recovers from the first, SIGSTOP (a rank
that hangs), an exception. Both: SIGKILL. The
agent or the launcher: SIGKILL, after which the launcher is started again, also once while another
program has its port; SIGSTOP for a while. All processes: SIGSTOP for longer than --failure_timeout,
as when the machine sleeps. The disk of --state_dir (as root only, since it is a file system of its
own): full for a while, or while a rank is killed and the host recovers. Then it waits until the
host generates again. At the end every job that the host has accepted must be done with the image it
would have been without faults, or failed with a reason. Prints JSON; lost and wrong_images must
be 0.
"""

import argparse
import contextlib
import io
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from PIL import Image

from tests.hosts.harness import RunningHost, free_port, session, start_launcher

FAULTS_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "hosts" / "faults"
KINDS = {
    "kill": 6,
    "kill, and again": 2,
    "stop": 3,
    "exception in the denoiser": 5,
    "exception in the decoder": 5,
    "kill both ranks": 2,
    "kill the agent": 1,
    "kill the launcher": 1,
    "take the port of a killed launcher": 1,
    "stop the agent": 1,
    "stop the launcher": 1,
    "pause of the machine": 1,
    "full disk": 2,
    "kill with a full disk": 1,
}
"""Fault -> relative frequency."""
FULL_DISK = ("full disk", "kill with a full disk")
STATE_MB = 300
"""Size of the file system that is filled."""
PLACES = {"exception in the denoiser": "denoiser", "exception in the decoder": "decode"}
PROMPTS = ("a red circle on a blue background", "a yellow star", "a green square")
SEEDS = (1, 2)
OUTSTANDING = 3
Pixels = np.ndarray
ROUNDING_LEVELS = 2
"""Of 255, by which two images of one seed may differ: a waiting job runs on one rank, which sums
in a different order from two.
"""
RECOVERED_WITHIN_S = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--failure-timeout", type=int, default=10)
    parser.add_argument(
        "--only", choices=list(KINDS), action="append", help="only these faults; may be repeated"
    )
    parser.add_argument(
        "--rest", type=float, default=0, help="seconds before each fault, e.g. until spares wait"
    )
    parser.add_argument(
        "--give-up-at", type=Path, help="end early, with what was counted, once this file exists"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, small_disk(folder) as is_small:
        for kind in FULL_DISK if not is_small else ():
            KINDS.pop(kind)
        for kind in KINDS.keys() - set(options.only or KINDS):
            KINDS.pop(kind)
        fault_file = Path(folder) / "next"
        fault_file.touch()
        arguments = (
            *(
                "--type=sdxl",
                "--backend=distrifuser",
                "--nproc_per_node=2",
                f"--height={options.side}",
                f"--width={options.side}",
            ),
            *(
                "--max_restarts=1000",
                "--spare_ranks=true",
                f"--failure_timeout={options.failure_timeout}",
                f"--state_dir={folder}/state",
            ),
            *("--keep_results=100000", "--keep_results_mb=10000"),
        )
        with Site(arguments, Path(folder), fault_file) as site:
            result = run(site, options)
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["lost"] or result["wrong_images"] or result["is_stuck"] else 0)


@contextlib.contextmanager
def small_disk(folder: str) -> Iterator[bool]:
    """Mount a small file system in FOLDER/state. Yields whether that was allowed."""
    path = Path(folder) / "state"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={STATE_MB}m,mode=700", "chaos", str(path)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


class Site:
    """A host that is started again, at the same port and with the same state, when it has ended."""

    def __init__(self, arguments: Sequence[str], folder: Path, fault_file: Path) -> None:
        self._arguments, self._folder, self.fault_file = arguments, folder, fault_file
        self._port = free_port()
        self._started = contextlib.ExitStack()
        self.logs = ""
        """Of the launchers before the present one."""

    def __enter__(self) -> "Site":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def start(self) -> None:
        environment = {"PYTHONPATH": str(FAULTS_FOLDER), "FAULT_FILE": str(self.fault_file)}
        self.host: RunningHost = self._started.enter_context(
            start_launcher(*self._arguments, environment=environment, port=self._port)
        )

    def url(self, path: str) -> str:
        return self.host.url(path)

    def post(self, body: Any, **kwargs: Any) -> requests.Response:
        return self.host.post(body, **kwargs)

    def end_and_start_again(self, process: psutil.Process, *, with_port_taken: bool) -> None:
        """Kill the process, without which the launcher and all ranks end, and start a launcher."""
        family = self.host.tree()
        process.kill()
        _, left = psutil.wait_procs(family, timeout=30)
        if left:
            raise Stuck(f"30 s after {process} was killed, {left} were still there")
        self.logs += self.host.log
        if with_port_taken:
            self._start_in_vain()
        self._started.close()
        self.start()

    def _start_in_vain(self) -> None:
        with socket.create_server(("127.0.0.1", self._port)):
            self._started.close()
            self.start()
            code = self.host.process.wait(RECOVERED_WITHIN_S)
            if code not in (1, 2) or "port" not in self.host.log:
                raise Stuck(f"with its port taken, the launcher ended with {code}: {self.host.log}")

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Leave no byte free where jobs are kept."""
        filler = self._folder / "state" / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        try:
            yield
        finally:
            filler.unlink()


def run(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    site.host.wait_until_ready()
    load = Load(site, steps=options.steps)
    load.generate_references()
    load.start()
    chance = random.Random(options.seed)
    struck: list[tuple[str, float]] = []
    started = time.monotonic()
    is_stuck = False
    try:
        kinds = chance.sample(list(KINDS), len(KINDS))  # each of them at least once
        kinds += chance.choices(list(KINDS), list(KINDS.values()), k=options.rounds)
        for number, kind in enumerate(kinds[: options.rounds]):
            if options.give_up_at is not None and options.give_up_at.exists():
                break
            time.sleep(options.rest)
            seconds = one_round(site, load, kind, chance, pause_s=options.failure_timeout + 3)
            struck.append((kind, seconds))
            print(f"round {number + 1}: {kind}, {seconds:.1f} s", file=sys.stderr, flush=True)
    except Stuck as error:
        is_stuck = True
        print(f"chaos: {error}", file=sys.stderr)
    finally:
        load.stop()
    return report(load, struck, wall_s=time.monotonic() - started) | {
        "seed": options.seed,
        "is_stuck": is_stuck,
    }


def one_round(
    site: Site, load: "Load", kind: str, chance: random.Random, *, pause_s: float
) -> float:
    """Return the seconds from the fault until the host has generated another image.

    pause_s: how long processes are stopped that then go on.
    """
    time.sleep(chance.uniform(0, 0.6))
    since = time.monotonic()
    if kind in PLACES:
        site.fault_file.write_text(f"{chance.randrange(2)} {PLACES[kind]}")
        wait_until(
            site, lambda: not site.fault_file.read_text().strip(), "the exception was raised"
        )
    elif kind == "full disk":
        with site.full_disk():
            time.sleep(chance.uniform(0.5, 5))
        since = time.monotonic()
    elif kind == "kill with a full disk":
        with site.full_disk():
            since = time.monotonic()
            kill_ranks(site, wait_for_ranks(site, set()), kind, chance)
            wait_until(site, lambda: site.host.status() == 200, "the model was loaded again")
    else:
        old = wait_for_ranks(site, set())
        launcher = psutil.Process(site.host.process.pid)
        (agent,) = launcher.children()
        since = time.monotonic()
        if kind in ("kill the agent", "kill the launcher", "take the port of a killed launcher"):
            site.end_and_start_again(
                agent if kind == "kill the agent" else launcher,
                with_port_taken=kind.startswith("take"),
            )
        elif kind.startswith(("stop the", "pause")):
            stopped = {"stop the agent": [agent], "stop the launcher": [launcher]}
            pause(stopped.get(kind, site.host.tree()), seconds=pause_s)
            since = time.monotonic()
        else:
            kill_ranks(site, old, kind, chance)
        wait_until(
            site, lambda: site.host.status() == 200, "the model was loaded again"
        )  # until then, images may be from before the fault
        if kind.startswith(("stop the", "pause")) and wait_for_ranks(site, set()) != old:
            raise Stuck(f"ranks were started again after: {kind}\n{site.host.log[-6000:]}")
    num_over = load.num_over
    wait_until(site, lambda: load.num_over > num_over, "an image was generated after the fault")
    return time.monotonic() - since


def kill_ranks(
    site: Site, old: Mapping[int, psutil.Process], kind: str, chance: random.Random
) -> None:
    """Kill or stop one rank, or kill both, or another one while these recover."""
    struck = list(old.values()) if kind == "kill both ranks" else [old[chance.randrange(2)]]
    for process in struck:
        process.send_signal(signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
    new = wait_for_ranks(site, set(old.values()))
    if kind == "kill, and again":
        time.sleep(chance.uniform(0, 3))  # at some point of loading
        new[chance.randrange(2)].kill()
        wait_for_ranks(site, set(old.values()) | set(new.values()))


def pause(processes: Sequence[psutil.Process], *, seconds: float) -> None:
    for signal_number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal_number)
        if signal_number == signal.SIGSTOP:
            time.sleep(seconds)


def wait_for_ranks(site: Site, old: set[Any]) -> dict[int, Any]:
    """Return both ranks once both run and neither is one of `old`."""
    found: dict[int, Any] = {}

    def are_there() -> bool:
        found.clear()
        found.update(site.host.ranks())
        return len(found) == 2 and not old & set(found.values())

    wait_until(site, are_there, "two new ranks were started")
    return found


def wait_until(site: Site, condition: Any, what: str) -> None:
    deadline = time.monotonic() + RECOVERED_WITHIN_S
    while not condition():
        if site.host.process.poll() is not None or time.monotonic() > deadline:
            raise Stuck(
                f"not within {RECOVERED_WITHIN_S} s: {what}. The host's log "
                f"ends:\n{site.host.log[-6000:]}"
            )
        time.sleep(0.05)


class Stuck(Exception):
    """The host did not recover."""


class Load(threading.Thread):
    """A client that always has a few jobs and remembers which ones were accepted."""

    def __init__(self, site: Site, *, steps: int) -> None:
        super().__init__(daemon=True)
        self._site = site
        self._steps = steps
        self._session = session()
        self._stopping = threading.Event()
        self._number = 0
        self.references: dict[tuple[str, int], Pixels] = {}
        self.accepted: dict[str, tuple[str, int]] = {}
        self.over: dict[str, dict[str, Any]] = {}
        self.images: dict[str, Pixels] = {}
        self.num_changed = 0
        """Jobs whose image differed when it was fetched again."""

    @property
    def num_over(self) -> int:
        return len(self.over)

    def generate_references(self) -> None:
        """Generate every image once, before any fault."""
        for prompt in PROMPTS:
            for seed in SEEDS:
                answer = self._site.post(self._body(prompt, seed), headers={"Accept": "image/png"})
                answer.raise_for_status()
                self.references[prompt, seed] = pixels(answer.content)

    def run(self) -> None:
        while not self._stopping.is_set() or set(self.accepted) - set(self.over):
            if not self._stopping.is_set() and len(self.accepted) - len(self.over) < OUTSTANDING:
                self._send()
            self._look()
            time.sleep(0.05)

    def stop(self) -> None:
        """Send no more jobs and wait for the accepted ones. Any that do not end are lost."""
        self._stopping.set()
        self.join(timeout=RECOVERED_WITHIN_S)

    def _body(self, prompt: str, seed: int) -> dict[str, Any]:
        return {"prompt": prompt, "seed": seed, "num_inference_steps": self._steps}

    def _send(self) -> None:
        """Send one job, with the same key until it is accepted.

        A lost response then creates no second job.
        """
        prompt, seed = (
            PROMPTS[self._number % len(PROMPTS)],
            SEEDS[self._number // len(PROMPTS) % len(SEEDS)],
        )
        answer = self._ask(
            "post",
            "/v1/jobs",
            json=self._body(prompt, seed),
            headers={"Idempotency-Key": f"chaos-{self._number}"},
        )
        if answer is not None and answer.status_code == 202:
            self.accepted[answer.json()["id"]] = (prompt, seed)
            self._number += 1

    def _look(self) -> None:
        for job_id in [job_id for job_id in self.accepted if job_id not in self.over]:
            answer = self._ask("get", f"/v1/jobs/{job_id}")
            if answer is None or answer.status_code >= 500:
                return
            facts = (
                answer.json()
                if answer.status_code == 200
                else {"state": "lost", "error": answer.text}
            )
            if facts["state"] in ("queued", "running"):
                continue
            if facts["state"] == "done" and not self._fetch(job_id):
                return
            self.over[job_id] = facts

    def _fetch(self, job_id: str) -> bool:
        answer = self._ask("get", f"/v1/jobs/{job_id}/result", headers={"Accept": "image/png"})
        if answer is None or answer.status_code != 200:
            return False
        made = pixels(answer.content)
        self.num_changed += not np.array_equal(self.images.setdefault(job_id, made), made)
        return True

    def fetch_again(self) -> None:
        """Fetch every image again: it must equal the one that was delivered."""
        for job_id, facts in self.over.items():
            if facts["state"] == "done" and not self._fetch(job_id):
                facts["state"] = "lost"

    def _ask(self, method: str, path: str, **kwargs: Any) -> requests.Response | None:
        """Return the response, or None while the host does not answer."""
        with contextlib.suppress(requests.RequestException):
            return self._session.request(method, self._site.url(path), timeout=20, **kwargs)
        return None


def pixels(png: bytes) -> Pixels:
    """Return int16 (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int16)


def report(load: Load, struck: list[tuple[str, float]], *, wall_s: float) -> dict[str, Any]:
    load.fetch_again()
    states = Counter(facts["state"] for facts in load.over.values())
    lost = [
        job_id
        for job_id in load.accepted
        if load.over.get(job_id, {"state": "lost"})["state"] == "lost"
    ]
    apart = [
        int(np.abs(made - load.references[load.accepted[job_id]]).max())
        for job_id, made in load.images.items()
    ]
    seconds = [one for _, one in struck] or [0.0]
    by_kind = {kind: [one for name, one in struck if name == kind] for kind in KINDS}
    return {
        "rounds": len(struck),
        "accepted": len(load.accepted),
        "done": states["done"],
        "failed_with_reason": sum(
            facts["state"] == "failed" and bool(facts["error"]) for facts in load.over.values()
        ),
        "reasons": sorted(
            {facts["error"] for facts in load.over.values() if facts["state"] == "failed"}
        )[:5],
        "begun_more_than_once": sum(facts.get("attempts", 1) > 1 for facts in load.over.values()),
        "lost": len(lost),
        "wrong_images": sum(levels > ROUNDING_LEVELS for levels in apart) + load.num_changed,
        "rounded_otherwise": sum(0 < levels <= ROUNDING_LEVELS for levels in apart),
        "furthest_levels": max(apart, default=0),
        "recovery_worst_s": round(max(seconds), 2),
        "recovery_median_s": round(statistics.median(seconds), 2),
        "by_fault": {
            kind: {
                "rounds": len(some),
                "median_s": round(statistics.median(some), 2),
                "worst_s": round(max(some), 2),
            }
            for kind, some in by_kind.items()
            if some
        },
        "wall_s": round(wall_s, 1),
    }


if __name__ == "__main__":
    main()
