"""--backend=auto on whole hosts: what they measure, tell, keep and measure again."""

import json

import numpy as np
import pytest

from hosts.jobs.speed import NUM_DRIFTING
from hosts.launch.auto_backend import remember
from tests.checkpoints import checkpoint
from tests.hosts.client import decode
from tests.hosts.harness import run_launcher, start_launcher, wait_until
from tests.hosts.launch.test_auto_backend import start, with_steps

ARGUMENTS = (
    "--type=sdxl",
    "--nproc_per_node=2",
    "--height=64",
    "--width=64",
    "--mode=latency",
    "--quality=exact",
)


@pytest.fixture
def measured_before(tmp_path):
    """Arguments of a launch whose steps were measured before, bands being the quickest."""
    found = start(height=64, width=64, mode="latency", quality="exact")
    steps = {"single": 1.0, "distrifuser patch 2 full_sync": 0.5, "distrifuser cfg 2": 0.7}
    remember(tmp_path, found.auto.key, with_steps(found, steps=steps))
    return (*ARGUMENTS, f"--checkpoint={checkpoint('sdxl')}", f"--state_dir={tmp_path}")


def test_check_tells_the_table_and_goes_by_what_was_measured_before(measured_before):
    checked = json.loads(run_launcher(*measured_before, "--check", "--json").stdout)
    assert (checked["backend"], checked["axes"]) == ("distrifuser", {"patch": 2})
    assert checked["planner"]["source"] == "measured 2026-01-01"
    assert "* distrifuser patch 2 full_sync" in run_launcher(*measured_before, "--check").stdout


@pytest.mark.slow
def test_host_tells_the_table_of_the_check_and_goes_by_it(measured_before):
    checked = json.loads(run_launcher(*measured_before, "--check", "--json").stdout)
    with start_launcher(*measured_before) as host:
        host.wait_until_ready()
        told = host.get("/settings").json()
        assert (
            told["planner"] == checked["planner"]
            and told["planner"]["source"] == "measured 2026-01-01"
        )
        assert (told["backend"], told["axes"], told["options"]["sync_mode"]) == (
            "distrifuser",
            {"patch": 2},
            "full_sync",
        )
        assert host.post({"positive": "a red circle", "seed": 3, "steps": 3}).status_code == 200
        assert (
            "backends.autotune.trials" not in host.log
            and "* distrifuser patch 2 full_sync" in host.log
        )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_measures_its_methods_on_request_and_goes_on(tmp_path):
    arguments = (
        "--type=sdxl", "--nproc_per_node=2", "--height=64", "--width=64",
        f"--checkpoint={checkpoint('sdxl')}", f"--state_dir={tmp_path}",
    )  # fmt: skip
    with start_launcher(*arguments) as host:
        host.wait_until_ready()
        first = image_of(host)
        done = run_launcher("measure", "--url", host.url(""), timeout_s=300)
        assert done.returncode == 0, done.stderr + host.log
        table = host.get("/settings").json()["planner"]
        close = [row for row in table["table"] if row.get("closeness_db") is not None]
        assert close and all(row["method"] in done.stdout for row in close)
        assert np.abs(image_of(host).astype(int) - first).max() <= 1
        assert host.post({"positive": "a", "seed": 1, "steps": 3}).status_code == 200
    with start_launcher(*arguments) as host:
        host.wait_until_ready()
        assert host.get("/settings").json()["planner"]["table"] == table["table"]
    with start_launcher(*arguments, "--backend=distrifuser") as host:
        host.wait_until_ready()
        refused = run_launcher("measure", "--url", host.url(""))
        assert refused.returncode == 2 and "there is nothing to measure" in refused.stderr
        assert image_of(host).shape == first.shape


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_whose_jobs_take_other_times_than_kept_measures_again_by_itself(measured_before):
    """What is kept is wrong by far: a second and more for each step."""
    with start_launcher(*measured_before) as host:
        host.wait_until_ready()
        first = image_of(host)
        assert host.get("/settings").json()["planner"]["source"] == "measured 2026-01-01"
        for _ in range(NUM_DRIFTING - 1):
            image_of(host)
        wait_until(
            lambda: host.get("/settings").json()["planner"]["source"] != "measured 2026-01-01",
            within_s=120,
            what="the methods are measured again",
        )
        assert np.abs(image_of(host).astype(int) - first).max() <= 1
        for _ in range(NUM_DRIFTING):
            image_of(host)
        assert host.log.count("measured again") == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_measures_at_its_first_start_and_remembers_at_its_second(tmp_path):
    """The image is that of the same method chosen by name."""
    arguments = (*ARGUMENTS, f"--checkpoint={checkpoint('sdxl')}")
    with start_launcher(*arguments, f"--state_dir={tmp_path}") as host:
        host.wait_until_ready()
        told = host.get("/settings").json()
        assert (
            told["planner"]["source"].startswith("measured 20")
            and "backends.autotune.trials: tried single, " in host.log
        )
        first = image_of(host)
    with start_launcher(*arguments, f"--state_dir={tmp_path}") as host:
        host.wait_until_ready()
        assert (
            host.get("/settings").json()["planner"] == told["planner"]
            and "backends.autotune.trials" not in host.log
        )
    named = (
        ["--no_split_batch", f"--sync_mode={told['options']['sync_mode']}"]
        if "patch 2" in told["planner"]["choice"]
        else []
    )
    with start_launcher(*arguments, f"--backend={told['backend']}", *named) as host:
        host.wait_until_ready()
        assert np.array_equal(image_of(host), first)


def image_of(host):
    body = host.post({"positive": "a red circle", "seed": 3, "steps": 3}).json()
    return np.asarray(decode(body["output"]))
