"""Trading through memory that ranks of one machine share: equal to messages, safe to use again, and
gone with the ranks.
"""

import logging
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from backends.groups import collectives
from backends.groups import shared_memory as module
from backends.groups.mesh import CommStats, Mesh
from backends.groups.shared_memory import TURNS, SharedFile, shared_memory
from backends.plan import ParallelPlan
from backends.xdit import exchange

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def mesh_of(rank, world_size):
    return Mesh(
        ParallelPlan(method="xdit", axes=(("ulysses", world_size),)),
        rank=rank,
        device=torch.device("cpu"),
    )


def tensors(sender, receiver, number, shape, count, dtype=torch.float32):
    """`count` tensors, not contiguous, whose values say who sent them to whom in which trade, and
    where they stand.
    """
    place = (
        torch.arange(count * shape[0] * shape[1]).view(count, shape[1], shape[0]).transpose(1, 2)
    )
    return (((sender * 4 + receiver) * 1000 + number) * 64 + place % 64).to(dtype).unbind(0)


def traded(way, rank, world_size, axis, number, shapes, count, dtype=torch.float32, traffic=None):
    """This rank's side of a trade in which rank i sends rank j a tensor of shapes[i][j]. Returns
    what it got by `way`.
    """
    outgoing = [
        tensors(rank, to, number, shapes[rank][to] if to != rank else (1, 1), count, dtype)
        for to in range(world_size)
    ]
    wanted = [shapes[of][rank] if of != rank else (1, 1) for of in range(world_size)]
    got = way(outgoing, wanted, axis=axis, traffic=traffic or CommStats())
    assert got[rank][0].data_ptr() == outgoing[rank][0].data_ptr()  # our own are not copied
    return got


def assert_got(got, rank, number, shapes, count):
    for of, parts in enumerate(got):
        if of != rank:
            for part, want in zip(
                parts, tensors(of, rank, number, shapes[of][rank], count), strict=True
            ):
                assert torch.equal(part, want), (of, rank, number)


def any_shapes(chance, world_size, limit):
    return [
        [(chance.randrange(limit), chance.randrange(limit)) for _ in range(world_size)]
        for _ in range(world_size)
    ]


def check_trades(rank, world_size, num_trades):
    mesh, chance, own_pace = mesh_of(rank, world_size), random.Random(0), random.Random(rank)
    axis = mesh.axis("ulysses")
    for dtype in DTYPES:  # uneven sizes, some of them zero, by both ways
        shapes, count = any_shapes(chance, world_size, 5), 3
        shapes[0][1] = shapes[1][0] = (0, 7)
        shared, sent = CommStats(), CommStats()
        got = traded(exchange._trade, rank, world_size, axis, 0, shapes, count, dtype, shared)
        want = traded(
            exchange._trade_by_messages, rank, world_size, axis, 0, shapes, count, dtype, sent
        )
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(list(mine), list(theirs), rtol=0, atol=0)
        assert (shared.sent_bytes, shared.messages) == (sent.sent_bytes, sent.messages)
        assert axis.memory.is_open
    for number in range(
        num_trades
    ):  # a rank that is late must find what it was sent, however far the others are
        shapes, count = any_shapes(chance, world_size, 3 + number % 40), 1 + number % 3
        got = traded(exchange._trade, rank, world_size, axis, number, shapes, count)
        if own_pace.random() < 0.1:
            time.sleep(own_pace.random() * 0.004)
        assert_got(got, rank, number, shapes, count)
    mesh.destroy()


@pytest.mark.parametrize("world_size", [2, 3])
def test_trades_equal_messages_and_never_meet_the_next_ones(run_on_ranks, world_size):
    run_on_ranks(check_trades, world_size, 500)


def check_gathers(rank, world_size):
    mesh, chance = mesh_of(rank, world_size), random.Random(0)
    axis = mesh.axis("ulysses")
    for dtype in DTYPES * 20:
        shapes = any_shapes(chance, world_size, 30)[0]  # uneven, and some of them empty
        own = tensors(rank, rank, 1, shapes[rank], 1, dtype)[0]
        shared, sent = CommStats(), CommStats()
        got = collectives.gather_pieces(own, shapes, axis=axis, traffic=shared)
        assert axis.memory.is_open
        copies = [piece.clone() for piece in got]
        want = collectives._gather_by_messages(own.contiguous(), shapes, axis, sent)()
        for mine, theirs in zip(copies, want, strict=True):
            assert torch.equal(mine, theirs)
        assert (shared.sent_bytes, shared.messages) == (sent.sent_bytes, sent.messages)
    mesh.destroy()


@pytest.mark.parametrize("world_size", [2, 3])
def test_pieces_gathered_through_memory_equal_messages(run_on_ranks, world_size):
    run_on_ranks(check_gathers, world_size)


def num_pipes():
    return sum(
        os.readlink(link).startswith("pipe:")
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink()
    )


def held_memory():
    """Descriptors and mappings of shared files in this process."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum("memfd:rank" in link for link in links), Path("/proc/self/maps").read_text().count(
        "memfd:rank"
    )


def check_nothing_is_left(rank, world_size):
    mesh, shapes = mesh_of(rank, world_size), [[(30, 40)] * world_size] * world_size
    axis, pipes = mesh.axis("ulysses"), num_pipes()
    for number in range(3):
        for _ in range(TURNS):
            assert_got(
                traded(exchange._trade, rank, world_size, axis, number, shapes, 2),
                rank,
                number,
                shapes,
                2,
            )
        assert held_memory() == (
            2 * TURNS * world_size,
            TURNS * world_size,
        )  # Python's mmap keeps a descriptor of its own
        assert num_pipes() == pipes + 2 * (world_size - 1)  # one end to and from each other rank
        mesh.rebuild()
        assert held_memory() == (0, 0)
        assert num_pipes() == pipes
    mesh.destroy()


def check_survivor(rank, world_size):
    mesh, shapes = mesh_of(rank, world_size), [[(300, 400)] * world_size] * world_size
    axis = mesh.axis("ulysses")
    traded(exchange._trade, rank, world_size, axis, 0, shapes, 1)
    assert not any(
        os.fstat(file.descriptor).st_nlink for file in axis.memory._own
    )  # no name by which one could be left behind
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # which torch sends to the ranks of one that ended so
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer"):
        for _ in range(2):  # what was sent before the end may still arrive
            traded(exchange._trade, rank, world_size, axis, 1, shapes, 1)
    assert time.monotonic() - begun < 10
    mesh.destroy()
    assert held_memory() == (0, 0)
    raise SystemExit("as wanted")


def test_memory_is_there_before_it_is_written():
    file = SharedFile(os.memfd_create("rank"))
    file.grow(100_000)
    assert os.fstat(file.descriptor).st_blocks * 512 >= 100_000
    file.view(0, (10,), torch.float32).fill_(1)
    earlier = file.view(64, (10,), torch.float64)
    file.grow(1_000_000)
    file.view(900_000, (10,), torch.bfloat16).fill_(2)
    file.view(64, (10,), torch.float64).fill_(3)
    assert earlier.sum() == 30  # the same memory
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.grow(2_000_000)


def test_nothing_is_left_when_groups_are_built_anew(run_on_ranks):
    run_on_ranks(check_nothing_is_left, 2)


def check_waiting_rank_is_woken(rank, world_size):
    mesh = mesh_of(rank, world_size)
    axis, piece = mesh.axis("ulysses"), torch.ones(3)
    collectives.gather_pieces(piece, [(3,)] * 2, axis=axis, traffic=CommStats())
    memory = axis.memory  # as a traceback may hold it
    if rank == 1:
        mesh.fail()
    else:
        with pytest.raises(RuntimeError, match="connection closed by peer 1"):
            collectives.gather_pieces(piece, [(3,)] * 2, axis=axis, traffic=CommStats())
        mesh.destroy()
    dist.barrier()  # rank 1 lives on until rank 0 was woken
    assert not memory.is_open


def test_rank_that_closes_its_mesh_wakes_the_one_that_waits(run_on_ranks):
    run_on_ranks(check_waiting_rank_is_woken, 2)


def test_killed_rank_fails_the_others_and_leaves_nothing(run_on_ranks):
    with pytest.raises(pytest.fail.Exception, match=r"rank0\n(.|\n)*as wanted"):
        run_on_ranks(check_survivor, 2)


def check_falls_back(rank, world_size):
    mesh, small, large = mesh_of(rank, world_size), [[(10, 10)] * 2] * 2, [[(400, 500)] * 2] * 2
    axis, records = mesh.axis("ulysses"), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    module.logger.addHandler(handler)
    assert_got(traded(exchange._trade, rank, world_size, axis, 0, small, 1), rank, 0, small, 1)
    if rank == 1:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    for number in (1, 2):
        traffic = CommStats()
        assert_got(
            traded(exchange._trade, rank, world_size, axis, number, large, 1, traffic=traffic),
            rank,
            number,
            large,
            1,
        )
        assert (traffic.messages, traffic.sent_bytes) == (1, 800_000)
    assert shared_memory(axis) is None
    assert held_memory()[0] == 0
    assert len(records) == rank  # the rank that lacks the memory says so, once
    assert (
        not records
        or "no 0.8 MB of shared memory left, so tensors use gloo from now on" in records[0]
    )
    mesh.destroy()


def test_tensors_go_by_messages_when_one_rank_gets_no_memory(run_on_ranks):
    run_on_ranks(check_falls_back, 2)


def check_strangers(rank, world_size):
    shapes = [[(4, 5)] * world_size] * world_size
    machine, make = module._machine, os.memfd_create
    for reason in ("machine", "file", "system"):
        if rank == 1:
            module._machine = (lambda: "another") if reason == "machine" else machine
            os.memfd_create = (
                (lambda name: os.open("/dev/null", os.O_RDWR)) if reason == "system" else make
            )
            module.SharedFile.identity = (
                property(lambda file: (0, 0)) if reason == "file" else SharedFile.identity
            )
        mesh = mesh_of(rank, world_size)
        axis = mesh.axis("ulysses")
        assert_got(
            traded(exchange._trade, rank, world_size, axis, 0, shapes, 1), rank, 0, shapes, 1
        )
        assert shared_memory(axis) is None, reason
        mesh.destroy()


def test_ranks_that_cannot_reach_each_other_share_nothing(run_on_ranks):
    run_on_ranks(check_strangers, 2)
