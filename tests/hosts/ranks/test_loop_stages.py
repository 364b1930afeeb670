"""A host whose ranks are stages of a pipeline: previews, a cancelled job, a failing and a killed
rank, and right images after each.
"""

import threading

import numpy as np
import pytest

from tests.checkpoints import checkpoint
from tests.hosts.client import decode
from tests.hosts.harness import READY_WITHIN_S, start_launcher, wait_until
from tests.hosts.sending import follow, over, send, show

BODY = {
    "prompt": "a red car",
    "negative_prompt": "blurry",
    "num_inference_steps": 6,
    "seed": 5,
    "guidance_scale": 7.0,
}
STAGES = (
    "--backend=xdit",
    "--pipefusion_parallel_degree=2",
    "--num_pipeline_patch=3",
    "--mode=latency",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=[2, 4], ids=["stages alone", "stages of both halves"])
def num_ranks(request):
    return request.param


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory, num_ranks):
    return tmp_path_factory.mktemp("faults") / "next"


@pytest.fixture(scope="module")
def host(fault_file, num_ranks):
    arguments = [
        "--type=sd3",
        f"--checkpoint={checkpoint('sd3')}",
        "--height=64",
        "--width=64",
        f"--nproc_per_node={num_ranks}",
        *STAGES,
    ]
    if num_ranks == 4:
        arguments.append("--use_cfg_parallel")
    with start_launcher(*arguments, environment={"FAULT_FILE": str(fault_file)}) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def reference(host):
    """The image of BODY before anything went wrong."""
    return drawn(host)


def drawn(host, **changes):
    answer = host.post({**BODY, **changes})
    assert answer.status_code == 200, answer.json()["message"]
    return np.asarray(decode(answer.json()["output"]))


def runs(host, job, attempt):
    facts = show(host, job)
    return facts["attempts"] == attempt and facts["step"] > 2


def test_previews_and_cancelled_jobs_leave_the_next_image_as_it_was(host, reference):
    for steps_before in (1, 4, 9):
        sent, found = send(host, {**BODY, "num_inference_steps": 200}), []
        watching = threading.Thread(target=follow, args=(host, sent, found))
        watching.start()
        wait_until(
            lambda: show(host, sent)["step"] > steps_before and found,
            within_s=30,
            what="it runs and has previews",
        )
        at = host.session.delete(host.url(f"/v1/jobs/{sent}"), timeout=20).json()["step"]
        (ended,) = over(host, sent)
        watching.join(timeout=20)
        assert ended["state"] == "cancelled" and ended["step"] <= at + 3
        assert (drawn(host) == reference).all()


def test_a_image_of_another_size_and_one_without_guidance_do_not_disturb_it(host, reference):
    assert drawn(host, width=96).shape == (64, 96, 3)
    assert (drawn(host, guidance_scale=1.0) != reference).any()
    assert (drawn(host) == reference).all()


def test_failure_of_each_rank_is_answered_by_name_and_the_next_image_is_right(
    host, reference, fault_file, num_ranks
):
    ranks = host.ranks()
    for rank in range(num_ranks):
        sent = send(host, {**BODY, "num_inference_steps": 200})
        for attempt in (1, 2):
            wait_until(
                lambda: runs(host, sent, attempt), within_s=30, what=f"attempt {attempt} runs"
            )
            fault_file.write_text(f"{rank} block")
        (ended,) = over(host, sent)
        assert (ended["state"], ended["error"]) == (
            "failed",
            f"rank {rank} failed: ArithmeticError: a fault of the test in block",
        )
        assert (drawn(host) == reference).all()
    assert host.ranks() == ranks, "the host was started again"


def test_a_killed_rank_is_replaced_and_its_job_is_done(host, reference, num_ranks):
    sent = send(host, {**BODY, "num_inference_steps": 60})
    wait_until(lambda: show(host, sent)["step"] > 3, within_s=30, what="the job runs")
    host.ranks()[num_ranks - 1].kill()
    wait_until(lambda: host.status() != 200, within_s=30, what="the ranks end")
    wait_until(
        lambda: host.status() == 200, within_s=READY_WITHIN_S, what="ready again", every_s=0.2
    )
    (ended,) = over(host, sent)
    assert (ended["state"], ended["attempts"], ended["step"]) == ("done", 2, 60)
    assert (drawn(host) == reference).all()
