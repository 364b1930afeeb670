"""Python objects between ranks: a message that no rank signed is never unpickled."""

import hashlib
import hmac
import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from backends.errors import UnsendableError
from backends.groups import message
from backends.groups.control_group import broadcast_command, gather_outcomes
from backends.groups.mesh import Mesh
from backends.groups.objects import (
    broadcast_object,
    gather_objects,
    receive_object,
    send_object,
)
from backends.plan import ParallelPlan

SECRET = b"only ours"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self):
        return os.mkdir, (self._path,)


def forged(path: str, secret: bytes = b"not theirs") -> torch.Tensor:
    """A pickle with the signature of another secret."""
    data = pickle.dumps(Trap(path))
    signed = hmac.new(secret, data, hashlib.sha256).digest() + data
    return torch.frombuffer(bytearray(signed), dtype=torch.uint8)


def check_values(rank: int, world_size: int) -> None:
    message.share_secret(SECRET)
    value = {"a": np.arange(rank * 1000 + 1), "rank": rank}
    for source in range(world_size):
        got = broadcast_object(value, source=source, group=dist.group.WORLD)
        assert got["rank"] == source and len(got["a"]) == source * 1000 + 1
    gathered = gather_objects(value, group=dist.group.WORLD)
    assert [each["rank"] for each in gathered] == list(range(world_size))
    if rank == 0:
        send_object(value, to=1, group=dist.group.WORLD)
        with pytest.raises(UnsendableError):
            send_object(lambda: None, to=1, group=dist.group.WORLD)
    else:
        assert receive_object(source=0, group=dist.group.WORLD)["rank"] == 0


def check_forged(rank: int, world_size: int, path: str) -> None:
    """Rank 0 is in the stranger's hands: it sends pickles as torch's own collectives do."""
    if rank == 1:
        message.share_secret(SECRET)
    data = forged(path)
    length = torch.tensor([len(data)])
    for receive in ("broadcast", "gather", "receive"):
        if rank == 0 and receive == "gather":
            others = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
            dist.all_gather(others, length)
            longest = int(max(others))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(data)] = data
            dist.all_gather([torch.empty_like(padded) for _ in range(2)], padded)
        elif rank == 0:
            give = {"broadcast": dist.broadcast, "receive": lambda t, src: dist.send(t, dst=1)}
            give[receive](length, src=0)
            give[receive](data, src=0)
        else:
            act = {
                "broadcast": lambda: broadcast_command(None),
                "gather": lambda: gather_outcomes("mine"),
                "receive": lambda: receive_object(source=0, group=dist.group.WORLD),
            }[receive]
            with pytest.raises(RuntimeError, match="is not from a rank of this host"):
                act()
    assert not os.path.exists(path)


def check_length(rank: int, world_size: int) -> None:
    for length in (-1, 0, 2**62):
        if rank == 0:
            dist.send(torch.tensor([length]), dst=1)
        else:
            with pytest.raises(RuntimeError, match=f"a message of {length} bytes is not from"):
                receive_object(source=0, group=dist.group.WORLD)


def test_values_arrive_whole(run_on_ranks: Callable[..., None]) -> None:
    run_on_ranks(check_values, 2)


def test_pickle_of_a_stranger_is_not_unpickled(run_on_ranks: Callable[..., None], tmp_path) -> None:
    run_on_ranks(check_forged, 2, str(tmp_path / "trapped"))


def test_length_that_cannot_be_is_refused(run_on_ranks: Callable[..., None]) -> None:
    run_on_ranks(check_length, 2)


def check_forged_on_a_mesh(rank: int, world_size: int, path: str) -> None:
    """Rank 0 does not know the secret. What encoders return goes this way."""
    if rank == 1:
        message.share_secret(SECRET)
    plan = ParallelPlan(method="test", axes=(("data", 2),))
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    if rank == 0:
        mesh.broadcast_object(Trap(path), source=0)
    else:
        with pytest.raises(RuntimeError, match="not from a rank of this host"):
            mesh.broadcast_object(None, source=0)
    mesh.destroy()


def test_no_forged_object_is_unpickled_from_a_mesh(run_on_ranks: Callable, tmp_path) -> None:
    run_on_ranks(check_forged_on_a_mesh, 2, str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()
