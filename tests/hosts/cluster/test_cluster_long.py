"""The long tail of a real gateway: each test starts its own, and does to it what happens in
weeks.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import checkpoint
from tests.hosts.cluster.harness import start_cluster
from tests.hosts.harness import free_port, run_launcher, wait_until

KEY = "0123456789abcdef"
RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def model():
    return (
        "--type=sdxl",
        f"--checkpoint={checkpoint('sdxl')}",
        "--height=64",
        "--width=64",
        f"--api_key={KEY}",
    )


def send(cluster, number, steps=30):
    return [
        cluster.client.submit(prompt="a red car", seed=seed, num_inference_steps=steps)
        for seed in range(number)
    ]


def wait_until_busy(cluster):
    wait_until(
        lambda: all(replica["jobs"] for replica in cluster.replicas()),
        within_s=60,
        what="all replicas work",
    )


def rank_of(replica):
    return next(
        process
        for process in psutil.Process(replica["pid"]).children(recursive=True)
        if "RANK" in process.environ()
    )


def actor_of(replica):
    return psutil.Process(replica["pid"]).parent()


def test_killed_ranks_and_actors_lose_no_job():
    with start_cluster(*model(), "--replicas=2", key=KEY) as cluster:
        cluster.wait_for_replicas(2)
        for process_of in (rank_of, actor_of):
            jobs = send(cluster, 8)
            wait_until_busy(cluster)
            process_of(cluster.replicas()[0]).kill()
            assert {job.wait().state for job in jobs} == {"done"}
            cluster.wait_for_replicas(2)
        assert cluster.describe()["lost"] == 1, "ranks are started again inside their replica"


def test_a_hanging_replica_is_left_out_and_its_job_begun_elsewhere():
    with start_cluster(*model(), "--replicas=2", key=KEY) as cluster:
        cluster.wait_for_replicas(2)
        jobs = send(cluster, 4)
        wait_until_busy(cluster)
        family = [
            psutil.Process(cluster.replicas()[0]["pid"]),
            *psutil.Process(cluster.replicas()[0]["pid"]).children(recursive=True),
        ]
        for process in family:
            process.suspend()
        assert {job.wait().state for job in jobs} == {"done"}


def test_a_killed_gateway_takes_everything_with_it_and_its_jobs_go_on_in_the_next(tmp_path):
    state = f"--state_dir={tmp_path / 'state'}"
    with start_cluster(*model(), state, "--replicas=1", key=KEY) as cluster:
        cluster.wait_for_replicas(1)
        jobs = send(cluster, 3, steps=40)
        wait_until_busy(cluster)
        cluster.signal_and_wait(signal.SIGKILL, within_s=10)
    with start_cluster(*model(), state, "--replicas=1", key=KEY) as cluster:
        cluster.wait_for_replicas(1)
        assert {cluster.client.job(job.id).wait().state for job in jobs} == {"done"}
        cluster.signal_and_wait(signal.SIGINT, within_s=10)


def test_replicas_follow_the_queue_up_and_down_and_a_drained_one_ends_its_job():
    rule = ("--min_replicas=1", "--max_replicas=2", "--jobs_per_replica=2", "--idle_seconds=3")
    with start_cluster(*model(), *rule, key=KEY) as cluster:
        cluster.wait_for_replicas(1)
        jobs = send(cluster, 4, steps=300)
        cluster.wait_for_replicas(2)
        assert {job.wait().state for job in jobs} == {"done"}
        wait_until(
            lambda: len(cluster.describe()["replicas"]) == 1,
            within_s=60,
            what="one replica is left",
        )
        (running,) = send(cluster, 1, steps=300)
        wait_until_busy(cluster)
        name = cluster.replicas()[0]["name"]
        assert (
            cluster.session.delete(cluster.url(f"/cluster/replicas/{name}"), timeout=20).json()[
                "state"
            ]
            == "draining"
        )
        assert running.wait().state == "done"
        wait_until(
            lambda: name not in [replica["name"] for replica in cluster.describe()["replicas"]],
            within_s=60,
            what="it is gone",
        )
        assert cluster.describe()["lost"] == 0
        cluster.wait_for_replicas(1)


def test_two_models_are_served_by_name(tmp_path):
    common = {"height": 64, "width": 64, "type": "sdxl", "engine": "ray"}
    other = {"type": "sd1", "checkpoint": str(checkpoint("sd1"))}
    file = tmp_path / "cluster.yaml"
    file.write_text(
        json.dumps(
            {
                **common,
                "deployments": {"fine": {"checkpoint": str(checkpoint("sdxl"))}, "quick": other},
            }
        )
    )
    with start_cluster(f"--config={file}", f"--api_key={KEY}", key=KEY) as cluster:
        for number in range(2):
            cluster.wait_for_replicas(1, model=number)
        assert cluster.client.models() == ["fine", "quick"]
        jobs = {
            name: cluster.client.submit(
                prompt="a red car", model=name, num_inference_steps=2, seed=1
            )
            for name in ("fine", "quick")
        }
        for number, job in enumerate(jobs.values()):
            assert job.wait().state == "done"
            assert cluster.describe(number)["replicas"][0]["done"] == 1
        assert jobs["fine"].result() != jobs["quick"].result()


def test_a_model_that_cannot_load_ends_the_gateway_with_the_reason(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    done = run_launcher(
        "--engine=ray",
        "--type=sdxl",
        f"--checkpoint={tmp_path}",
        f"--port={free_port()}",
        timeout_s=200,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: replica sdxl-1 cannot serve: ") and str(tmp_path) in last


def test_a_taken_port_and_a_missing_cluster_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_launcher("--engine=ray", "--type=sdxl", f"--port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "cannot be bound" in done.stderr
    port = free_port()
    done = run_launcher(
        "--engine=ray",
        "--type=sdxl",
        f"--port={free_port()}",
        f"--ray_address=127.0.0.1:{port}",
        timeout_s=200,
    )
    assert done.returncode == 2
    assert (
        f"error: --ray_address=127.0.0.1:{port} cannot be used" in done.stderr
        and "Start the cluster" in done.stderr
    )


@contextlib.contextmanager
def ray_nodes(number):
    """A Ray cluster of nodes with one CPU each on this machine, started as an operator does it: its
    address, and what runs on each node.
    """
    address, started = f"127.0.0.1:{free_port()}", []
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp"
    ) as folder:  # Ray allows short paths only
        head = [
            "--head",
            f"--port={address.rpartition(':')[2]}",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
        ]
        try:
            for place in (head, *[[f"--address={address}"]] * (number - 1)):
                command = [
                    RAY,
                    "start",
                    *place,
                    "--num-cpus=1",
                    "--object-store-memory=83886080",
                    "--block",
                ]
                started.append(
                    psutil.Popen(
                        command,
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                )
                wait_until(
                    lambda: len(raylets(started)) == len(started), within_s=60, what="the node runs"
                )
            yield address, started
        finally:
            family = [
                process for node in started for process in (node, *node.children(recursive=True))
            ]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)


def raylets(nodes):
    return [
        process
        for node in nodes
        for process in node.children(recursive=True)
        if process.name() == "raylet"
    ]


def test_a_node_that_dies_takes_no_job_with_it(monkeypatch):
    """Two nodes with room for one replica each; the gateway joins their cluster."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as on a network of one's own
    joined = (*model(), "--replicas=2")
    with (
        ray_nodes(2) as (address, nodes),
        start_cluster(*joined, f"--ray_address={address}", key=KEY) as cluster,
    ):
        cluster.wait_for_replicas(2)
        jobs = send(cluster, 6)
        wait_until_busy(cluster)
        raylets(nodes[1:])[0].kill()
        assert {job.wait().state for job in jobs} == {"done"}
        wait_until(lambda: cluster.num_ready() == 1, within_s=60, what="one replica is left")
        assert any(
            "waits for a node with 1 CPU" in replica["reason"] for replica in cluster.replicas()
        )


def test_gateway_whose_own_raylet_dies_ends_with_the_reason(tmp_path):
    """It stayed for ever, ready for nothing."""
    arguments = (*model(), "--replicas=1", f"--state_dir={tmp_path / 'state'}")
    with start_cluster(*arguments, key=KEY) as cluster:
        cluster.wait_for_replicas(1)
        send(cluster, 1, steps=200)
        family = psutil.Process(cluster.process.pid).children(recursive=True)
        for process in family:
            if process.name() == "raylet":
                process.kill()
        assert cluster.process.wait(timeout=60) == 1
        assert "(raylet) has ended, so no replica can be started" in cluster.log
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
