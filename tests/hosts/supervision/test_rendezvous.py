"""Two machines make one image: two launchers in two network namespaces with a cable between them
(two loopback addresses elsewhere).
"""

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass

import numpy as np
import pytest

from tests.checkpoints import checkpoint
from tests.hosts.client import assert_is_error, decode
from tests.hosts.harness import READY_WITHIN_S, free_port, run_launcher, start_launcher, wait_until

BODY = {"prompt": "a red car", "num_inference_steps": 4, "seed": 5, "guidance_scale": 7.0}
MODEL = (
    "--type=sdxl",
    f"--checkpoint={checkpoint('sdxl')}",
    "--height=64",
    "--width=64",
    "--mode=latency",
    "--backend=distrifuser",
)


@dataclass(frozen=True)
class Network:
    """first: address of machine 0. second: what machine 1's commands begin with. cable: its end on
    machine 0, if it can be pulled.
    """

    first: str
    second: tuple[str, ...] = ()
    cable: str | None = None

    def plug(self, state):
        subprocess.run(["ip", "link", "set", self.cable, state], check=True)


@pytest.fixture(scope="module")
def network():
    name, number = f"nodes{os.getpid()}", os.getpid() % 250
    if (
        shutil.which("ip") is None
        or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode
    ):
        yield Network(first="127.0.0.2")
        return
    try:
        cable, inside = f"{name}a"[-15:], f"{name}b"[-15:]
        for command in (
            f"ip link add {cable} type veth peer name {inside} netns {name}",
            f"ip addr add 10.199.{number}.1/24 dev {cable}",
            f"ip link set {cable} up",
            f"ip -n {name} addr add 10.199.{number}.2/24 dev {inside}",
            f"ip -n {name} link set {inside} up",
            f"ip -n {name} link set lo up",
        ):
            subprocess.run(command.split(), check=True)
        yield Network(first=f"10.199.{number}.1", second=("ip", "netns", "exec", name), cable=cable)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


KEY = "--rdzv_key=a-secret-of-both-machines"


def arguments(network, port, rank, *more):
    return (
        *MODEL,
        "--nnodes=2",
        f"--node_rank={rank}",
        f"--rdzv_endpoint={network.first}:{port}",
        "--node_timeout=170",
        KEY,
        *more,
    )


@dataclass
class Pair:
    """Both launchers. The second can be started again."""

    network: Network
    port: int
    stack: contextlib.ExitStack
    first: object = None
    second: object = None

    def start_second(self):
        self.second = self.stack.enter_context(
            start_launcher(*arguments(self.network, self.port, 1), prefix=self.network.second)
        )

    def wait_until_ready(self):
        wait_until(
            lambda: self.first.status() == 200, within_s=READY_WITHIN_S, what="ready", every_s=0.2
        )

    def waits(self):
        """What it says while it waits for machine 1."""
        wait_until(
            lambda: "waiting for machine 1" in self.said(),
            within_s=60,
            what="it waits",
            every_s=0.2,
        )
        return self.said()

    def said(self):
        return self.first.get("/readyz").text if self.first.status() else ""


@pytest.fixture(scope="module")
def pair(network):
    with contextlib.ExitStack() as stack:
        running = Pair(network, free_port(), stack)
        running.first = stack.enter_context(
            start_launcher(*arguments(network, running.port, 0, "--failure_timeout=5"))
        )
        running.start_second()
        yield running


@pytest.fixture(scope="module")
def reference():
    """The image of BODY by two ranks on one machine."""
    with start_launcher(*MODEL, "--nproc_per_node=2") as host:
        host.wait_until_ready()
        return pixels(host.post(BODY))


def pixels(answer):
    body = answer.json()
    assert answer.status_code == 200, body["message"]
    return np.asarray(decode(body["output"])).astype(int)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_machines_draw_what_two_ranks_of_one_machine_draw(reference, pair):
    pair.first.wait_until_listening()
    pair.wait_until_ready()
    assert (pixels(pair.first.post(BODY)) == reference).all()
    facts = pair.first.get("/settings").json()
    assert (facts["ranks"], facts["axes"]["cfg"]) == (2, 2)
    assert [rank["rank"] for rank in facts["ranks_now"]] == [0, 1]
    assert len(pair.first.ranks()) == len(pair.second.ranks()) == 1
    assert "listening" not in pair.second.log


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--checkpoint=/nowhere/model"], "--checkpoint=/nowhere/model does not exist."),
        (
            ["--rdzv_endpoint=somewhere"],
            "--rdzv_endpoint=somewhere is not allowed. Allowed: HOST:PORT",
        ),
        (["--node_rank=2"], "--node_rank=2 is not one of --nnodes=2 machines. Allowed: 0 to 1."),
        (["--backend=asyncdiff", "--model_n=4"], "model_n=4 and stride=1 need 4 ranks"),
    ],
)
def test_second_machine_refuses_what_cannot_be_before_it_starts_a_rank(given, said):
    named = {argument.partition("=")[0] for argument in given}
    start = ("--nnodes=2", "--node_rank=1", "--rdzv_endpoint=127.0.0.1:29500", KEY)
    others = [argument for argument in start if argument.partition("=")[0] not in named]
    done = run_launcher("--type=sdxl", *others, *given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_several_machines_need_an_endpoint():
    done = run_launcher("--type=sdxl", "--nnodes=2", "--node_rank=1")
    assert done.returncode == 2
    assert (
        "--nnodes=2 needs --rdzv_endpoint. Give HOST:PORT, the address of the first machine and a "
        "free port there." in done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "whom"),
    [(0, "machine 1 of 2 to join 127.0.0.1:{}"), (1, "machine 0 at 127.0.0.1:{}")],
)
def test_machine_whose_partner_never_comes_ends_after_its_limit_and_says_who_is_missing(rank, whom):
    port = free_port()
    start = (
        f"--node_rank={rank}",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--node_timeout=5",
        f"--port={free_port()}",
    )
    done = run_launcher(*MODEL, "--nnodes=2", KEY, *start, timeout_s=170)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"error: waited 5 s for {whom.format(port)} (--node_timeout). Start every machine"
    )


def send(host, **more):
    answer = host.session.post(host.url("/v1/jobs"), json={**BODY, **more}, timeout=20)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def state(host, job):
    return host.get(f"/v1/jobs/{job}").json()


def over(host, job):
    wait_until(
        lambda: host.status() and state(host, job)["state"] in ("done", "failed"),
        within_s=60,
        what="the job is over",
        every_s=0.2,
    )
    return state(host, job)


def running_job(host):
    job = send(host, num_inference_steps=200)
    wait_until(lambda: state(host, job)["step"] > 3, within_s=60, what="the job runs")
    return job


def assert_all_is_as_before(pair, reference, job, waiting):
    pair.wait_until_ready()
    assert (over(pair.first, job)["state"], over(pair.first, job)["attempts"]) == ("done", 2)
    assert over(pair.first, waiting)["state"] == "done"
    assert (pixels(pair.first.post(BODY)) == reference).all()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("machine", [1, 0])
def test_rank_that_is_killed_on_one_machine_starts_both_again_and_loses_no_job(
    machine, reference, pair
):
    pair.wait_until_ready()
    old = [pair.first.ranks()[0], pair.second.ranks()[0]]
    job, waiting = running_job(pair.first), send(pair.first)
    old[machine].kill()
    wait_until(
        lambda: not any(process.is_running() for process in old),
        within_s=30,
        what="the old ranks are gone",
    )
    assert_all_is_as_before(pair, reference, job, waiting)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_machine_that_is_lost_is_waited_for_and_jobs_go_on_when_it_is_back(reference, pair):
    pair.wait_until_ready()
    job = running_job(pair.first)
    pair.second.signal_and_wait(signal.SIGKILL, within_s=3)
    said = pair.waits()
    assert said == f"waiting: waiting for machine 1 of 2 to join {pair.network.first}:{pair.port}"
    assert pair.first.get("/initialize").status_code == 503
    refused = pair.first.post(BODY)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
    assert "the host is waiting for machine 1" in assert_is_error(refused.json())
    waiting = send(pair.first)
    pair.start_second()
    assert_all_is_as_before(pair, reference, job, waiting)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_machine_that_cannot_be_reached_is_noticed_and_comes_back_with_its_cable(reference, pair):
    if pair.network.cable is None:
        pytest.skip("there is no cable: network namespaces are not allowed here")
    pair.wait_until_ready()
    job, waiting = running_job(pair.first), send(pair.first)
    pair.network.plug("down")
    try:
        pair.waits()
    finally:
        pair.network.plug("up")
    assert_all_is_as_before(pair, reference, job, waiting)
