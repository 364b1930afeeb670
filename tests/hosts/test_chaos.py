"""The short form of benchmarks/chaos.py: every kind of fault at least once, and nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_at_random_moments_lose_no_job_and_spoil_no_picture():
    command = [sys.executable, "-m", "benchmarks.chaos", "--rounds=8", "--seed=11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["rounds"] == 8 and set(result["by_fault"]) >= {"kill", "stop"}
    assert (result["lost"], result["wrong_pictures"]) == (0, 0)
    assert result["done"] + result["failed_with_reason"] == result["accepted"] > 8
