"""The short form of benchmarks/chaos.py: nothing lost, nothing wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_at_random_moments_lose_no_job_and_spoil_no_image():
    """Each kind of fault once; a full disk only where a file system may be mounted."""
    rounds = 14
    command = [sys.executable, "-m", "benchmarks.chaos", f"--rounds={rounds}", "--seed=6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["rounds"] == rounds and len(result["by_fault"]) >= 12
    assert (result["lost"], result["wrong_images"]) == (0, 0)
    assert result["done"] + result["failed_with_reason"] == result["accepted"] > rounds
