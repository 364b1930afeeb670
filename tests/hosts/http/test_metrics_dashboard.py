"""docs/grafana.json asks only for figures that /metrics has."""

import json
import re
from pathlib import Path

import numpy as np

from backends.request import GenerateRequest, GenerateResult
from hosts.http.metrics import Metrics
from hosts.jobs.queue import JobQueue
from hosts.supervision.host_state import HostState

DASHBOARD = Path(__file__).resolve().parents[3] / "docs" / "grafana.json"


def metrics_after_one_job(frames):
    queue, state = JobQueue(), HostState()
    figures = {"rank": 0, "memory_bytes": 1, "seconds": 1.0, "wait_s": 0.5, "sent_bytes": 9}
    state.tell({"ranks_now": [figures], "restarts": 2})
    metrics = Metrics(queue, state)
    queue.submit(GenerateRequest(prompt="a", seed=1))
    report = {"stages": {"encode": 0.1, "step": 0.5, "decode": 0.2}}
    made = GenerateResult(
        frames=frames,
        latents=None,
        seed=1,
        num_steps=1,
        exactness="exact",
        seconds=1.0,
        report=report,
    )
    queue.finish(queue.next(), result=made)
    with metrics.serialising():
        pass
    return metrics.text().decode()


def test_every_figure_of_the_dashboard_is_measured():
    text = metrics_after_one_job(np.zeros((1, 8, 8, 3), dtype=np.uint8))
    measured = set(re.findall(r"^(diffusion_\w+)", text, re.MULTILINE))
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"diffusion_\w+", target["expr"])
    }
    assert len(asked) >= 10 and not asked - measured, asked - measured
    stages = set(re.findall(r'diffusion_stage_seconds_count\{stage="(\w+)"\}', text))
    assert stages == {"encode", "denoise", "decode", "serialise"}
    assert "diffusion_restarts 2.0" in text
