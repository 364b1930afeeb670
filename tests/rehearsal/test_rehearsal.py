"""The rehearsal itself: what CUDA and NCCL refuse is refused, and deadlocks are found in
journals.
"""

import copy
import gc
import io
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.rehearsal.gpus import MEMORY
from tests.rehearsal.journal import HostWait, Operation, Wait
from tests.rehearsal.order import problems, queued_behind
from tests.rehearsal.rehearsal import Rehearsal, WouldHang
from tests.rehearsal.tensors import WouldFail


def _see_what_cuda_refuses(rank, world_size):
    with Rehearsal(num_devices=2, index=1) as rehearsal:
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert str(x.device) == "cuda:1"
        assert (x * 2 + torch.tensor(1.0)).sum().item() == 36.0
        with pytest.raises(WouldFail, match="two devices, cpu and cuda:1"):
            x + torch.ones(3)
        with pytest.raises(WouldFail, match="two devices, cuda:0 and cuda:1"):
            x + torch.ones(3, device="cuda:0")
        with pytest.raises(WouldFail, match="invalid device ordinal"):
            x.to("cuda:2")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert rehearsal.journal.host_waits.total() == 1  # the item() above
        mask = x > 2
        assert str(mask[mask].device) == "cuda:1"
        _see_that_modules_move()
        there = pickle.loads(pickle.dumps(x))
        rehearsal.set_device(0)
        assert str(there.device) == "cuda:1"
    assert not torch.cuda.is_available()
    assert torch.ones(1).device.type == "cpu"


def _see_that_modules_move():
    layer = nn.Linear(3, 2)
    expected = layer(torch.ones(1, 3))
    layer.to("cuda", torch.float64)
    found = layer(torch.ones(1, 3, device="cuda", dtype=torch.float64))
    assert str(found.device) == "cuda:1"
    torch.testing.assert_close(found.detach().cpu().float(), expected.detach())
    assert str(copy.deepcopy(layer).weight.device) == "cuda:1"
    layer.to("cpu")
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.device.type == "cpu"
    torch.save(layer.state_dict(), io.BytesIO())
    layer._parameters["weight"] = layer.weight.detach()  # as diffusers puts what GGUF keeps in fp32
    for device in ("cuda", "cpu"):
        assert layer.to(device).weight.device.type == device


def test_what_cuda_refuses_is_refused(run_on_ranks):
    run_on_ranks(_see_what_cuda_refuses, 1)


def _normalise_halves_in_float32(rank, world_size):
    """As the text encoders of Gemma do. Only CUDA has a kernel for it."""
    with Rehearsal():
        x = torch.randn(3, 5).half()
        for normalise in (torch.softmax, torch.log_softmax):
            for dtype in (torch.float32, torch.float16):
                found = normalise(x.cuda(), -1, dtype=dtype)
                assert (found.device.type, found.dtype) == ("cuda", dtype)
                torch.testing.assert_close(found.cpu(), normalise(x, -1, dtype=dtype))


def test_softmax_of_halves_may_be_in_float32(run_on_ranks):
    run_on_ranks(_normalise_halves_in_float32, 1)


def _ask_for_memory(rank, world_size):
    dist.destroy_process_group()
    with Rehearsal():
        assert torch.cuda.mem_get_info() == (MEMORY, MEMORY)


def test_a_process_without_ranks_has_all_memory(run_on_ranks):
    run_on_ranks(_ask_for_memory, 1)


def _see_what_nccl_refuses(rank, world_size):
    with Rehearsal(num_devices=2, index=rank, hang_s=0.3) as rehearsal:
        group, other = (dist.new_group([0, 1], backend="nccl") for _ in range(2))
        x = torch.full((4,), rank + 1.0, device=f"cuda:{rank}")
        dist.all_reduce(x, group=group)
        assert x.tolist() == [3.0] * 4
        with pytest.raises(WouldFail, match="a CPU tensor was given to an NCCL group"):
            dist.all_reduce(torch.ones(1), group=group)
        with pytest.raises(WouldFail, match=r"given a tensor on cuda:"):
            dist.all_reduce(torch.ones(1, device=f"cuda:{1 - rank}"), group=group)
        with pytest.raises(WouldFail, match="a CUDA tensor was given to a gloo group"):
            dist.all_reduce(x)
        dist.barrier()
        if rank == 1:
            dist.destroy_process_group(group)
            del group
            # the errors above hold it, and only its last reference closes its connections
            gc.collect()
        else:
            _see_that_a_lost_peer_hangs(rehearsal, x, group, other)
        dist.barrier()


def _see_that_a_lost_peer_hangs(rehearsal, x, group, other):
    dist.all_reduce(x, group=group)  # which tells nothing
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    with pytest.raises(WouldHang, match=r"event\.synchronize"):
        event.synchronize()
    with pytest.raises(WouldHang, match="copy to the CPU"):
        x.cpu()
    with pytest.raises(WouldHang, match="ncclCommAbort"):
        other.abort()
    group.abort()
    x.cpu()
    with pytest.raises(RuntimeError, match="was aborted"):
        dist.all_reduce(x, group=group)
    rehearsal.get_stuck("a kernel", other)
    with pytest.raises(RuntimeError, match="timed out"):
        rehearsal.host_waits_at_most(timedelta(seconds=0.1).total_seconds(), "work.wait(timeout)")


def test_what_nccl_refuses_is_refused_and_a_lost_peer_hangs(run_on_ranks):
    run_on_ranks(_see_what_nccl_refuses, 2)


def operation(number, kind, *, group="a", elements=1, **facts):
    return Operation(
        number=number,
        kind=kind,
        group=group,
        ranks=(0, 1),
        elements=elements,
        dtype="float32",
        where="",
        **facts,
    )


def test_order_accepts_what_fits():
    first = [operation(1, "all_reduce"), Wait(1), HostWait(), operation(2, "send", peer=1)]
    second = [
        operation(1, "all_reduce"),
        Wait(1),
        operation(2, "recv", peer=0),
        Wait(2),
        HostWait(),
    ]
    assert problems([first, second]) == []


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([operation(1, "all_reduce")], [], "operations by rank"),
        ([operation(1, "all_reduce")], [operation(1, "all_gather")], "different kinds"),
        ([operation(1, "all_reduce")], [operation(1, "all_reduce", elements=2)], "different sizes"),
        (
            [operation(1, "broadcast", source=0)],
            [operation(1, "broadcast", source=1)],
            "different sources",
        ),
        ([operation(1, "send", peer=1)], [operation(1, "send", peer=0)], "both {'send'}"),
        (
            [operation(1, "all_to_all", sent=(0, 2), received=(0, 1))],
            [operation(1, "all_to_all", sent=(1, 0), received=(3, 0))],
            "sends 2",
        ),
        (
            [operation(1, "batch", messages=(("send", 1, 4),))],
            [operation(1, "batch", messages=(("recv", 0, 5),))],
            "no partner",
        ),
    ],
)
def test_order_finds_what_does_not_match(first, second, said):
    (problem,) = problems([first, second])
    assert said in problem


def test_order_finds_groups_that_are_used_in_different_orders():
    first = [operation(1, "all_reduce"), Wait(1), operation(2, "all_reduce", group="b"), Wait(2)]
    second = [operation(1, "all_reduce", group="b"), Wait(1), operation(2, "all_reduce"), Wait(2)]
    (problem,) = problems([first, second])
    assert "waiting in a circle" in problem


def test_order_finds_a_first_send_whose_receiver_waits_for_something_later():
    first = [operation(1, "send", peer=1), operation(2, "broadcast", source=0), Wait(2)]
    second = [
        operation(1, "broadcast", source=0),
        Wait(1),
        HostWait(),
        operation(2, "recv", peer=0),
        Wait(2),
    ]
    (problem,) = problems([first, second])
    assert "meeting" in problem


def test_order_finds_streams_that_need_several_hardware_queues():
    """A receive that is posted early holds up, on the only queue, the send that its partner waits
    for.
    """
    first = [operation(1, "recv", peer=1), operation(2, "all_reduce"), Wait(2), Wait(1)]
    second = [operation(1, "all_reduce"), Wait(1), operation(2, "send", peer=0)]
    assert problems([first, second]) != []  # the meeting of the pair comes too late
    met = (
        [operation(8, "send", peer=1), operation(9, "recv", peer=1)],
        [operation(8, "recv", peer=0), operation(9, "send", peer=0)],
    )
    assert problems([met[0] + first, met[1] + second]) == []
    assert problems([met[0] + first, met[1] + second], streams="one") != []


def test_order_finds_what_queues_behind_what_is_needed_later():
    late, now = operation(1, "all_to_all"), operation(2, "all_gather")
    elsewhere = operation(2, "all_gather", group="b")
    assert queued_behind([late, now, Wait(2), Wait(1)], 0)
    assert not queued_behind([late, Wait(1), now, Wait(2)], 0)
    assert not queued_behind([late, elsewhere, Wait(2), Wait(1)], 0)
