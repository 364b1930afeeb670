"""Checks on real GPUs what the tests only rehearse, in ten minutes. One JSON object per line.

    python -m benchmarks.gpu --output=gpu.jsonl    # all sections
    python -m benchmarks.gpu facts speed           # some of them
    python -m benchmarks.gpu --device=rehearsed    # the logic of this file, without a GPU

Models are tiny and made here: nothing is downloaded. A check that fails, hangs or ends its process
is one line with "error"; the others run all the same.

With several GPUs each rank has its own. On one GPU two ranks share it, which NCCL refuses unless
each claims to be another host; messages then go through sockets: the order of kernels, hangs and
aborts are real, the speed of links is not.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.distributed as dist

from benchmarks.gpu_checks import SECTIONS, Check, Found, Place, checks
from hosts.launch.gpus import RANK_ENVIRONMENT
from tests.rehearsal.runs import checkpoint_of

SHARED_GPU = {
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
}
START = "spawn"
"""Not a fork, as a library may have asked for GPUs when it was imported."""
CHECK_WITHIN_S = {"cuda": 90.0, "rehearsed": 300.0, "cpu": 300.0}
LOOK_EVERY_S = 0.1
BROKEN = 3
"""Exit code of a process whose GPU gives nothing but errors after a check."""


class Report:
    """Writes JSON lines. Every process of a run appends to the same file."""

    def __init__(self, output: str | None) -> None:
        self.output = output

    def say(self, section: str, **found: Any) -> None:
        line = json.dumps({"section": section, **found}, default=str) + "\n"
        # one write, so that lines of several processes do not mix
        os.write(1, line.encode())
        if self.output is not None:
            with open(self.output, "a", encoding="utf-8") as file:
                file.write(line)

    def of(self, check: Check, run: Callable[[], Found], **labels: Any) -> None:
        """What a check finds, or its error, and its seconds."""
        started, found = time.perf_counter(), {}
        try:
            found = dict(run())
        except Exception as error:  # noqa: BLE001  any error is a finding
            found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found["at"] = [line.strip() for line in traceback.format_exc().splitlines()[-5:-1]]
        found["seconds"] = round(time.perf_counter() - started, 1)
        self.say(check.section, **check.labels, **labels, **found)


def run_all(chosen: Sequence[Check], place: Place, report: Report, *, until: float) -> None:
    """Run checks of one process after each other in one, those of several in processes of their
    own. until: time.monotonic() after which none begins.
    """
    left = list(chosen)
    while left:
        if time.monotonic() > until:
            for check in left:
                report.say(check.section, **check.labels, error="not run: the time is over")
            return
        if left[0].ranks > 1:
            _run_on_ranks(left.pop(0), place, report)
            continue
        together = list(itertools.takewhile(lambda check: check.ranks == 1, left))
        left = left[_run_in_one_process(together, place, report, until=until) :]


def _run_in_one_process(
    chosen: Sequence[Check], place: Place, report: Report, *, until: float
) -> int:
    """Return how many of the checks have been reported; fewer than all after one that broke the
    process.
    """
    context = multiprocessing.get_context(START)
    done = context.Value("i", 0)
    process = context.Process(
        target=_work, args=(chosen, place, report, done, until - time.monotonic())
    )
    process.start()
    before, since = 0, time.monotonic()
    while process.is_alive() and time.monotonic() - since < place.check_within_s:
        process.join(LOOK_EVERY_S)
        if done.value != before:
            before, since = done.value, time.monotonic()
    is_stuck = process.is_alive()
    process.kill()
    process.join()
    count = done.value
    if count == len(chosen) or process.exitcode in (0, BROKEN):
        return count
    why = (
        f"did not end within {place.check_within_s:g} s"
        if is_stuck
        else f"ended its process ({process.exitcode})"
    )
    report.say(chosen[count].section, **chosen[count].labels, error=why)
    return count + 1


def _work(chosen: Sequence[Check], place: Place, report: Report, done: Any, left_s: float) -> None:
    until = time.monotonic() + left_s
    with place.device() as device:
        for check in chosen:
            if time.monotonic() > until:
                break
            report.of(check, lambda check=check: check.run(device, *check.args))
            done.value += 1
            if _is_broken(device):
                os._exit(BROKEN)
    os._exit(0)


def _is_broken(device: torch.device) -> bool:
    """Whether a kernel has failed, after which CUDA answers this process with errors only."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return True
    return False


def _run_on_ranks(check: Check, place: Place, report: Report) -> None:
    context = multiprocessing.get_context(START)
    for case in check.args:
        checkpoint_of(case.type)  # ranks would build it twice
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, folder, check, place, report))
            for rank in range(check.ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + place.check_within_s
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        for rank, process in enumerate(processes):
            if process.is_alive() or process.exitcode:
                why = "did not end in time" if process.is_alive() else f"ended ({process.exitcode})"
                report.say(check.section, **check.labels, rank=rank, error=why)
            process.kill()
            process.join()


def _rank(rank: int, folder: str, check: Check, place: Place, report: Report) -> None:
    is_shared = place.is_real and check.ranks > place.num_gpus
    own = {**SHARED_GPU, "NCCL_HOSTID": f"rank{rank}"} if is_shared else {}
    os.environ.update(own)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=check.ranks,
        timeout=timedelta(seconds=place.check_within_s),
    )
    with place.device(rank) as device:
        report.of(check, lambda: check.run(device, rank, *check.args), rank=rank)
    os._exit(0)  # a hung kernel would block any other exit


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "sections", nargs="*", help=f"of: {', '.join(SECTIONS)}; all, if none is named"
    )
    parser.add_argument("--device", choices=("cuda", "rehearsed", "cpu"), default="cuda")
    parser.add_argument("--output", help="a file to which the lines are written too")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="after which no check begins (default: 10)"
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))} is no section. Allowed: {', '.join(SECTIONS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch sees no GPU. Give --device=rehearsed or --device=cpu to try the logic of this "
            "file without one."
        )
    for name, value in {**RANK_ENVIRONMENT, "NCCL_DEBUG": "WARN"}.items():
        os.environ.setdefault(name, value)
    num_gpus = {"cuda": torch.cuda.device_count(), "rehearsed": 2, "cpu": 0}[options.device]
    place = Place(options.device, num_gpus, CHECK_WITHIN_S[options.device])
    report = Report(options.output)
    wanted = options.sections or SECTIONS
    chosen = [check for check in checks(place) if check.section in wanted]
    run_all(chosen, place, report, until=time.monotonic() + 60 * options.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
