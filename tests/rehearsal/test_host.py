"""A whole host on two rehearsed GPUs, as a user starts it: the parts that are rehearsed elsewhere
one by one are put together by the program itself.

The tests use one host, in this order.
"""

import json
import time
from pathlib import Path

import pytest

from hosts.launch.gpus import RANK_ENVIRONMENT
from tests.hosts.client import assert_is_error
from tests.hosts.harness import start_launcher, wait_until
from tests.hosts.sending import ARGUMENTS, BODY, OneRank, difference, over, pixels, send, show

HERE = Path(__file__).parent / "host"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rehearsed")


@pytest.fixture(scope="module")
def host(folder):
    environment = {
        "PYTHONPATH": str(HERE),
        "FAULT_FILE": str(folder / "next"),
        "REHEARSED_NOTES": str(folder),
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:512",
    }
    arguments = ("--backend=distrifuser", "--variant=fp32", "--mode=latency", "--spare_ranks=true")
    with start_launcher(*ARGUMENTS, *arguments, environment=environment) as running:
        running.wait_until_ready()
        wait_until(lambda: len(spares(running)) == 2, within_s=120, what="the spares are there")
        yield running


@pytest.fixture(scope="module")
def want():
    return OneRank()(BODY)


def drawn(host):
    return pixels(host, over(host, send(host, BODY))[0]["id"])


def spares(host):
    ranks = [process.pid for process in host.ranks().values()]
    return [process for process in host.tree()[2:] if process.pid not in ranks]


def environments(folder):
    """Of each process that has been a rank."""
    return [json.loads(path.read_text()) for path in folder.glob("*-*.json")]


def test_every_gpu_has_a_rank_and_the_image_is_that_of_a_cpu(host, want):
    assert difference(drawn(host), want) <= 1
    ranks = host.get("/settings").json()["ranks_now"]
    assert [rank["device"] for rank in ranks] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_of_one_rank_wakes_the_other_which_waits_in_a_kernel(host, want, folder, rank):
    """Without the alarm it would wait for good."""
    ranks = host.ranks()
    (folder / "next").write_text(f"{rank} denoiser\n" * 2)
    started = time.monotonic()
    answer = host.post(BODY, timeout=60)
    seconds = time.monotonic() - started
    print(f"rank {rank}: answered after {seconds:.1f} s", flush=True)
    assert (
        assert_is_error(answer.json())
        == f"rank {rank} failed: ArithmeticError: a fault of the test in denoiser"
    )
    assert difference(drawn(host), want) <= 1
    assert host.ranks() == ranks, "the host was started again"


def test_spares_take_the_places_of_ranks_on_gpus(host, want):
    new = {process.pid for process in spares(host)}
    job = send(host, {**BODY, "num_inference_steps": 60})
    wait_until(lambda: show(host, job)["step"] > 2, within_s=60, what="it runs")
    host.ranks()[1].kill()
    wait_until(lambda: host.status() != 200, within_s=30, what="the ranks end")
    host.wait_until_ready()
    assert {process.pid for process in host.ranks().values()} == new
    (facts,) = over(host, job)
    assert (facts["state"], facts["attempts"]) == ("done", 2)
    assert difference(drawn(host), want) <= 1


def test_each_rank_has_the_settings_for_cuda_and_nccl(host, folder):
    found = environments(folder)
    assert len(found) == 4, "two ranks, and two that were spares"
    ours = {name: value for name, value in RANK_ENVIRONMENT.items() if "ALLOC" not in name}
    for environment in found:
        assert environment.items() >= ours.items()
        assert "PYTORCH_CUDA_ALLOC_CONF" not in environment, "what the user set is overruled"


def test_gpus_that_torch_cannot_use_end_the_launch_with_the_reason():
    environment = {"PYTHONPATH": str(HERE)}
    with start_launcher(*ARGUMENTS, "--backend=distrifuser", environment=environment) as host:
        assert host.process.wait(timeout=120) == 1
        assert "can use none of this machine's 2 GPU(s) with driver 580.65" in host.log
