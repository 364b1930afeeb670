"""A real gateway over a real Ray cluster with two replicas of one rank each, which all tests of
this file share, the last one ending it.
"""

import io
import signal
import threading

import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.checkpoints import checkpoint
from tests.hosts.cluster.harness import Cluster, start_cluster
from tests.hosts.harness import wait_until

KEY = "0123456789abcdef"
STEPS_OF_A_LONG_JOB = 300


@pytest.fixture(scope="module")
def cluster():
    arguments = (
        "--type=sdxl",
        f"--checkpoint={checkpoint('sdxl')}",
        "--height=64",
        "--width=64",
        "--replicas=2",
        f"--api_key={KEY}",
    )
    with start_cluster(*arguments, key=KEY) as cluster:
        cluster.wait_for_replicas(2)
        yield cluster


def sample_image(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_jobs_are_shared_out_evenly_and_their_images_are_the_replicas_own(cluster: Cluster):
    """The jobs are long enough that a moment in which one replica gets no CPU does not decide."""
    before = {replica["name"]: replica["done"] for replica in cluster.replicas()}
    jobs = [
        cluster.client.submit(prompt="a red car", seed=seed % 2, num_inference_steps=12)
        for seed in range(8)
    ]
    assert {job.wait().state for job in jobs} == {"done"}
    done = {
        replica["name"]: replica["done"] - before[replica["name"]] for replica in cluster.replicas()
    }
    assert sum(done.values()) == 8 and min(done.values()) >= 3, done
    sample_images = [sample_image(job.result()) for job in jobs]
    assert (
        all((drawn == sample_images[index % 2]).all() for index, drawn in enumerate(sample_images))
        and (sample_images[0] != sample_images[1]).any()
    )
    assert jobs[0].state.settings["prompt"] == "a red car" and jobs[0].state.steps == 12


def test_replicas_get_as_much_of_a_busy_machine_as_other_programs(cluster: Cluster):
    niceness = [psutil.Process(replica["pid"]).nice() for replica in cluster.replicas()]
    assert niceness == [psutil.Process().nice()] * 2


def test_a_job_can_be_followed_looked_at_and_cancelled(cluster: Cluster):
    job = cluster.client.submit(prompt="a red car", num_inference_steps=STEPS_OF_A_LONG_JOB)
    steps, previews = set(), 0
    for state in job.follow(previews=True):
        steps.add(state.step)
        previews += state.preview is not None
        if previews and len(steps) > 2:
            break
    job.cancel()
    for state in job.follow():
        last = state
    assert last.state == "cancelled" and 0 < last.step < STEPS_OF_A_LONG_JOB
    wait_until(
        lambda: not any(replica["jobs"] for replica in cluster.replicas()),
        within_s=20,
        what="the replicas are idle",
    )


def test_what_a_replica_refuses_is_the_clients_to_read(cluster: Cluster):
    """The gateway reads requests, and does not know what a pipeline can do."""
    refused = cluster.post({"prompt": "x", "num_inference_steps": 2, "scheduler": "unheard_of"})
    assert refused.status_code == 400 and "'unheard_of'" in refused.json()["message"]


def test_metrics_are_those_of_every_replica(cluster: Cluster):
    families = {
        family.name: family
        for family in text_string_to_metric_families(cluster.get("/metrics").text)
    }
    ready = {
        sample.labels["replica"]: sample.value for sample in families["diffusion_ready"].samples
    }
    assert ready == {replica["name"]: 1.0 for replica in cluster.replicas()}
    states = {
        sample.labels["state"]: sample.value
        for sample in families["diffusion_gateway_replicas"].samples
    }
    assert states["ready"] == 2
    done = [
        sample
        for sample in families["diffusion_jobs"].samples
        if sample.labels.get("state") == "done" and "_total" in sample.name
    ]
    assert {sample.labels["replica"] for sample in done} == set(ready) and {
        sample.labels["model"] for sample in done
    } == {"sdxl"}


def test_status_shows_every_replica(cluster: Cluster):
    shown = cluster.status()
    assert shown.returncode == 0, shown.stderr
    for replica in cluster.replicas():
        (line,) = [line for line in shown.stdout.splitlines() if replica["name"] in line]
        assert "ready" in line and "127.0.0.1" in line


def test_replicas_answer_nobody_without_their_own_keys(cluster: Cluster):
    for replica in cluster.replicas():
        launcher = psutil.Process(replica["pid"]).cmdline()
        (port,) = (part.partition("=")[2] for part in launcher if part.startswith("--port="))
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):  # the gateway's is another
            for path in ("/v1/jobs", "/settings", "/metrics"):
                answer = requests.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=10)
                assert answer.status_code == 401, (path, headers, answer.text)


def test_a_replica_that_is_killed_in_the_middle_loses_no_job(cluster: Cluster):
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(
            cluster.post({"prompt": "a red car", "num_inference_steps": 12, "seed": 3})
        )
    )
    waiting.start()
    jobs = [
        cluster.client.submit(prompt="a red car", seed=seed, num_inference_steps=12)
        for seed in range(4)
    ]
    wait_until(
        lambda: all(replica["jobs"] for replica in cluster.replicas()),
        within_s=30,
        what="both replicas work",
    )
    victim = cluster.replicas()[0]
    psutil.Process(victim["pid"]).kill()
    assert {job.wait().state for job in jobs} == {"done"}
    waiting.join(timeout=60)
    assert answers[0].status_code == 200
    again = cluster.client.job(jobs[0].id)
    assert (
        again.state.state == "done"
        and (sample_image(again.result()) == sample_image(jobs[0].result())).all()
    )
    assert victim["name"] not in [replica["name"] for replica in cluster.replicas()]
    assert cluster.describe()["lost"] == 1 and len(cluster.replicas()) == 2, (
        "another one takes its place"
    )


def test_ray_is_reached_by_nobody_else(cluster: Cluster):
    """Every process of it listens on this machine alone."""
    heard = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in cluster.tree()
        if process.name().startswith(("gcs_server", "raylet", "ray::"))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert heard == {"127.0.0.1"}


def test_after_a_signal_everything_is_gone(cluster: Cluster):
    running = cluster.client.submit(prompt="a red car", num_inference_steps=STEPS_OF_A_LONG_JOB)
    assert cluster.signal_and_wait(signal.SIGTERM, within_s=10) < 10
    assert cluster.process.returncode == 0, running.id
    assert "stopping" in cluster.log
