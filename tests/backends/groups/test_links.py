"""How a failure reaches the other ranks, and what is done to the groups of a mesh. What needs GPUs
is rehearsed in tests/rehearsal/.
"""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from backends.groups.alarm import Alarm
from backends.groups.collectives import AsyncAllToAll, all_gather, all_sum, broadcast, gather_pieces
from backends.groups.links import abort_all, pairs_of, pairs_to_last
from backends.groups.mesh import Axis, Mesh
from backends.parallel.weight_shards import KeptWeights, is_placeholder, move
from backends.plan import ParallelPlan

CPU = torch.device("cpu")


def test_alarm_reaches_a_thread_of_each_watcher_once_and_no_other_mesh():
    store = dist.HashStore()
    here, there = Alarm(store), Alarm(store)
    heard = {name: [] for name in ("ours", "closed", "other")}
    for name, times in heard.items():
        there.watch(name, lambda times=times: times.append(time.monotonic()))
    there.forget("closed")
    here.sound("closed")
    sounded = time.monotonic()
    here.sound("ours")
    while not heard["ours"]:
        assert time.monotonic() - sounded < 10
        time.sleep(0.01)
    time.sleep(0.5)  # two more looks
    assert [len(times) for times in heard.values()] == [1, 0, 0]
    there.forget("other")


class Store(dist.HashStore):
    """One whose server is gone."""

    def check(self, keys):
        raise RuntimeError("Connection reset by peer")

    def set(self, key, value):
        raise RuntimeError("Connection reset by peer")


def test_alarm_without_an_answering_store_raises_nothing():
    alarm = Alarm(Store())
    alarm.watch("ours", lambda: pytest.fail("nobody sounded it"))
    alarm.sound("ours")
    time.sleep(0.5)
    alarm.forget("ours")


class Group:
    """Its abort ends when those of all groups are under way, as NCCL's may."""

    def __init__(self, barrier):
        self._barrier = barrier

    def abort(self):
        self._barrier.wait(timeout=10)


def test_groups_are_aborted_together(caplog):
    barrier = threading.Barrier(3)
    abort_all([Group(barrier) for _ in range(3)])
    assert not caplog.messages
    abort_all([])


def test_pairs_are_those_that_send_and_in_one_order():
    assert pairs_of("segment", 3) == [(0, 1), (0, 2), (1, 2)]
    assert pairs_of("stage", 3) == [(0, 1), (1, 2)]
    assert pairs_of("ulysses", 3) == []
    assert pairs_to_last(3, 3) == [(0, 2), (1, 2)]
    assert pairs_to_last(4, 2) == [(0, 1), (0, 3), (1, 2), (2, 3)]


def _see_that_a_closed_mesh_is_refused(rank, world_size):
    mesh = Mesh(ParallelPlan(method="test", axes=(("data", 2),)), rank=rank, device=CPU)
    axis, x = mesh.axis("data"), torch.ones(2)
    mesh.destroy()
    for use in (
        lambda: all_gather(x, dim=0, axis=axis),
        lambda: all_sum(x, axis=axis),
        lambda: broadcast(x, source=0, axis=axis),
        lambda: gather_pieces(x, [x.shape] * 2, axis=axis, traffic=mesh.traffic),
        lambda: AsyncAllToAll(*[x.view(torch.uint8)] * 2, [8, 8], axis=axis),
        lambda: AsyncAllToAll(*[x.view(torch.uint8)] * 2, [8, 8], axis=axis, is_late=True),
    ):
        with pytest.raises(
            RuntimeError, match=r"axis 'data' of 2 ranks was used while its mesh is closed"
        ):
            use()
    mesh.rebuild()
    assert all_sum(x, axis=axis).tolist() == [2.0, 2.0]
    mesh.destroy()


def test_rank_by_itself_goes_on_after_a_failure():
    mesh = Mesh(ParallelPlan(method="test"), rank=0, device=CPU)
    mesh.fail()
    assert not mesh.groups.is_aborted


def test_closed_mesh_gives_no_wrong_numbers(run_on_ranks):
    run_on_ranks(_see_that_a_closed_mesh_is_refused, 2)


class Pipe(torch.nn.Module):
    """As much of a pipeline as `move` needs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.layer.weight.data = torch.zeros(()).expand(8, 8)

    @property
    def components(self):
        return {"layer": self.layer, "tokenizer": None}


def test_stand_ins_of_other_ranks_weights_stay_without_memory_when_they_are_moved():
    pipe = Pipe()
    bias = pipe.layer.bias.detach().clone()
    move(pipe, torch.device("meta"))
    assert pipe.layer.weight.shape == (8, 8)
    assert pipe.layer.weight.stride() == (0, 0)
    assert pipe.layer.weight.device.type == pipe.layer.bias.device.type == "meta"
    assert bias.shape == pipe.layer.bias.shape


def test_parts_are_restored_into_the_buffers_of_modules_that_were_moved():
    parts = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    kept = KeptWeights([[part] for part in parts], kept=0)

    def to(device):
        for part in parts:
            part._apply(torch.clone)  # parameters stay, and buffers are new

    move(SimpleNamespace(components=dict(enumerate(parts)), to=to), CPU)
    assert is_placeholder(parts[1].running_mean)
    kept.restore(Axis(name="stage", ranks=(0,), rank=0, group=None))
    assert not any(is_placeholder(tensor) for tensor in parts[1].buffers())
