"""What a rank does with the GPUs that it finds: takes its own, tries the links, or says what is
wrong with them.
"""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from backends import planner
from backends.autotune.cost import num_communicators
from backends.autotune.trials import Trials
from backends.errors import ConfigError
from backends.groups.control_group import gather_outcomes
from backends.groups.devices import select_device
from backends.groups.links import is_busy, open_links
from backends.groups.mesh import DATA_TIMEOUT, Mesh
from backends.plan import ParallelPlan
from backends.xdit.exchange import attention_with_lse
from tests.backends.features import TABLE
from tests.checkpoints import checkpoint
from tests.rehearsal.gpus import COMMUNICATOR_BYTES
from tests.rehearsal.order import communicators
from tests.rehearsal.rehearsal import Rehearsal

PLAIN = ParallelPlan(method="single", axes=(("data", 2),))


def test_gpus_that_torch_cannot_use_are_an_error_and_no_silent_run_on_the_cpu():
    with pytest.raises(
        ConfigError,
        match=(
            r"can use none of this machine's 2 GPU\(s\) with driver 535\.1\. Install torch with "
            r"CUDA"
        ),
    ):
        select_device(0, num_gpus=2, driver="535.1")
    assert select_device(0, num_gpus=0).type == "cpu"


def _see_devices(rank, world_size):
    with Rehearsal(num_devices=2) as rehearsal:
        assert str(select_device(1, local_world_size=2, num_gpus=2)) == "cuda:1"
        assert rehearsal.index == 1
        with pytest.raises(
            ConfigError,
            match=(
                r"3 ranks are started on this machine, but torch sees 2 GPUs .* "
                r"--nproc_per_node=2"
            ),
        ):
            select_device(0, local_world_size=3)
    with (
        Rehearsal(capability=(7, 0)),
        pytest.raises(
            ConfigError,
            match=(
                r"has compute capability 7\.0, but torch .* kernels from 7\.5 .* Update the "
                r"driver"
            ),
        ),
    ):
        select_device(0, num_gpus=1)


def test_each_rank_takes_its_own_gpu_and_too_few_or_too_old_ones_are_refused(run_on_ranks):
    run_on_ranks(_see_devices, 1)


def _try_dead_links(rank, world_size):
    with Rehearsal(num_devices=2, index=rank, has_dead_links=True, hang_s=30.0):
        group, device = dist.new_group([0, 1], backend="nccl"), torch.device("cuda", rank)
        started = time.monotonic()
        advice = (
            r"ranks 0, 1 cannot reach each other: .* within 0\.5 s\. Try NCCL_P2P_DISABLE=1 "
            r".*--shm-size"
        )
        with pytest.raises(ConfigError, match=advice):
            open_links(group, (0, 1), rank, device=device, pairs=[(0, 1)], within_s=0.5)
        assert time.monotonic() - started < 5
        group.abort()


def test_links_that_do_not_work_are_found_at_once_with_advice(run_on_ranks):
    run_on_ranks(_try_dead_links, 2)


PLANS = (
    ("distrifuser", {"no_split_batch": True}, 2),
    ("distrifuser", {}, 4),
    ("distrifuser", {"sync_mode": "full_sync"}, 4),
    ("asyncdiff", {"use_cfg_parallel": False, "model_n": 4}, 4),
    ("asyncdiff", {"use_cfg_parallel": True}, 4),
    ("xdit", {"ulysses_degree": 2, "ring_degree": 2}, 4),
    ("xdit", {"pipefusion_parallel_degree": 2}, 2),
    ("xdit", {"pipefusion_parallel_degree": 4}, 4),
    ("xdit", {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True}, 4),
    ("xdit", {"pipefusion_parallel_degree": 2, "ulysses_degree": 2}, 4),
)


def _count_communicators(rank, world_size):
    with Rehearsal(num_devices=4, index=rank) as rehearsal:
        device = torch.device("cuda", rank)
        subject = SimpleNamespace(device=device)
        trials = Trials(subject, spec=TABLE["sd3"], rank=rank, world_size=4, halves=2)
        link = trials.link()
        assert link.communicator_bytes == COMMUNICATOR_BYTES
        for backend, options, size in PLANS:
            spec = TABLE["sd3" if backend == "xdit" else "sdxl"]
            options = {**options, "checkpoint": str(checkpoint(spec.name))}
            plan = planner(backend)(spec, options, size)
            team, number = divmod(rank, size)
            before = rehearsal.num_communicators
            mesh = Mesh(plan, rank=number, device=device, team=team, num_teams=4 // size)
            mesh.prepare()
            mesh.background_axis()
            opened = gather_outcomes(rehearsal.num_communicators - before)
            mesh.destroy()
            assert max(opened) == num_communicators(plan, is_sharded=True), plan.describe()


def test_planner_counts_the_memory_of_all_communicators(run_on_ranks):
    for name in ("sd3", "sdxl"):
        checkpoint(name)
    run_on_ranks(_count_communicators, 4)


def _open_for_divided_weights(rank, world_size):
    with Rehearsal(num_devices=2, index=rank, hang_s=30.0) as rehearsal:
        device = torch.device("cuda", rank)
        mesh = Mesh(PLAIN, rank=rank, device=device)
        mesh.background_axis()
        opened = communicators(rehearsal.journal.entries, rank)
        assert {one.group for one in opened} == {
            mesh.axis("data").group.group_name,
            mesh.background_axis().group.group_name,
        }
        assert {*rehearsal.groups.limits} == {DATA_TIMEOUT}
        mesh.destroy()


def test_links_of_divided_weights_are_opened_with_the_others(run_on_ranks):
    run_on_ranks(_open_for_divided_weights, 2)


def _see_who_is_busy(rank, world_size):
    assert not is_busy(torch.device("cpu"))
    with Rehearsal() as rehearsal:
        assert not is_busy(torch.device("cuda", 0))
        rehearsal.get_stuck("a kernel that waits for a peer", None)
        assert is_busy(torch.device("cuda", 0))


def test_device_that_waits_for_others_is_busy(run_on_ranks):
    run_on_ranks(_see_who_is_busy, 1)


def _attend(rank, world_size, capability, dtype):
    query, key, value = torch.randn(3, 1, 2, 33, 16).unbind()
    want, want_lse = attention_with_lse(query, key, value, scale=None)
    with Rehearsal(capability=capability):
        given = [tensor.to("cuda", dtype) for tensor in (query, key, value)]
        found, lse = attention_with_lse(*given, scale=None)
        torch.testing.assert_close(found.cpu(), want, atol=0.02, rtol=0.02)
        torch.testing.assert_close(lse.cpu(), want_lse, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), torch.float16), ((7, 5), torch.float16), ((9, 0), torch.float32)],
)
def test_ring_attention_takes_the_kernel_that_the_card_has(run_on_ranks, capability, dtype):
    run_on_ranks(_attend, 1, capability, dtype)
