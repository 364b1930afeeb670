"""Seconds from a failure on one rank until the others have the error to answer with, for every
method, on rehearsed GPUs (tests/rehearsal/). One JSON object per line.

    python -m benchmarks.failures                   # every case: half an hour on two cores
    python -m benchmarks.failures ulysses patches   # some of them

The last rank fails late in its denoiser's third call, or in its VAE. The others then wait in
kernels that never end, as with NCCL. A case is an error unless the weights stay loaded and the next
images are those of before.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.backends.features import TABLE, prepare
from tests.rehearsal.case import Ranks
from tests.rehearsal.cases import FAILING_LONG, FAILING_SHORT
from tests.rehearsal.runs import checkpoint_of, fail_on_last_rank

CASES = {case.label: case for case in (*FAILING_SHORT, *FAILING_LONG)}


def _rank(rank: int, case: Ranks, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=case.ranks
    )
    seconds = fail_on_last_rank(case, rank, rounds=rounds)
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure(case: Ranks, rounds: int) -> dict[str, Any]:
    """Run one case in processes of its own."""
    line: dict[str, Any] = {"case": case.label, "type": case.type, "backend": case.backend}
    line |= {"ranks": case.ranks, "fails_in": case.fails_in}
    if case.type in TABLE:  # files for all ranks, which would each build them
        prepare(TABLE[case.type], [case.feature] if case.feature else [])
    else:
        checkpoint_of(case.type)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(
                _rank, (case, rounds, folder), nprocs=case.ranks, start_method="forkserver"
            )
        except Exception as error:  # noqa: BLE001  whatever ended a rank is this case's result
            return line | {"error": str(error).strip().splitlines()[-1]}
        files = [Path(folder, f"{rank}.json") for rank in range(case.ranks)]
        seconds = [json.loads(file.read_text()) for file in files]
    told = [max(each) for each in zip(*(times for times in seconds[:-1] if times), strict=True)]
    return line | {"others_told_after_s": [round(each, 2) for each in told]}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", help="labels of tests/rehearsal/cases.py; all if none")
    parser.add_argument("--rounds", type=int, default=2, help="failures of each (default: 2)")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"{', '.join(sorted(unknown))} is no case. Allowed: {', '.join(CASES)}.")
    multiprocessing.set_forkserver_preload(["tests.preload", "tests.rehearsal.runs"])
    has_failed = False
    for label in options.cases or CASES:
        line = measure(CASES[label], options.rounds)
        has_failed |= "error" in line
        print(json.dumps(line), flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
