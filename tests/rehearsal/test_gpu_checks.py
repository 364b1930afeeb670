"""benchmarks/gpu.py on rehearsed GPUs: every check runs, and one that fails, hangs or ends its
process is a line, beside those of the others.
"""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.gpu import Report, run_all
from benchmarks.gpu_checks import SECTIONS, Check, Place


def _raise(device):
    raise ValueError("this card is broken")


def _end(device):
    os._exit(7)


def _hang(device):
    time.sleep(600)


def _work(device):
    return {"device": str(device)}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_check_that_fails_hangs_or_ends_its_process_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "START", "forkserver")
    place = Place("rehearsed", 2, check_within_s=20.0)
    chosen = [
        Check(section=run.__name__, run=run)
        for run in (_work, _raise, _work, _end, _work, _hang, _work)
    ]
    report = Report(str(tmp_path / "gpu.jsonl"))
    run_all(chosen, place, report, until=time.monotonic() + 300)
    found = lines_of(tmp_path / "gpu.jsonl")
    assert [line["section"] for line in found] == [check.section for check in chosen]
    errors = [line.get("error", "") for line in found]
    assert errors[1] == "ValueError: this card is broken"
    assert errors[3] == "ended its process (7)"
    assert "did not end within 20 s" in errors[5]
    assert all(line["device"] == "cuda:0" for line in found[::2])
    run_all(chosen[:1], place, report, until=time.monotonic() - 1)
    assert lines_of(tmp_path / "gpu.jsonl")[-1]["error"] == "not run: the time is over"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("section", SECTIONS)
def test_checks_run_on_rehearsed_gpus(tmp_path, section):
    output = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", section, "--device=rehearsed"]
    subprocess.run([*command, f"--output={output}", "--minutes=14"], check=True, timeout=1190)
    found = lines_of(output)
    assert found
    assert not [line for line in found if "error" in line]
    assert all(line.get("off_after_cancelling", 0) <= 0.01 for line in found)
