"""The short form of benchmarks/chaos.py: nothing lost, nothing wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "seed", "kinds"),
    [(3, 6, {"kill", "exception in the denoiser"}), (8, 11, {"kill", "stop"})],
)
@pytest.mark.timeout(900)
def test_faults_at_random_moments_lose_no_job_and_spoil_no_image(rounds, seed, kinds):
    command = [sys.executable, "-m", "benchmarks.chaos", f"--rounds={rounds}", f"--seed={seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["rounds"] == rounds and set(result["by_fault"]) >= kinds
    assert (result["lost"], result["wrong_images"]) == (0, 0)
    assert result["done"] + result["failed_with_reason"] == result["accepted"] > rounds
