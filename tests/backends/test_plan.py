"""Plans and the groups made from them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from backends.errors import PlanError, UnsendableError
from backends.groups.collectives import all_gather
from backends.groups.control_group import (
    broadcast_command,
    control_of_team,
    gather_outcomes,
    open_channels,
)
from backends.groups.mesh import Mesh
from backends.plan import ParallelPlan, require_world_size

PLAN = ParallelPlan(method="test", axes=(("cfg", 2), ("patch", 2)))


def test_the_last_axis_has_neighbouring_ranks() -> None:
    assert PLAN.ranks("patch", of_rank=3) == (2, 3)
    assert PLAN.ranks("cfg", of_rank=3) == (1, 3)
    assert PLAN.ranks("cfg", "patch", of_rank=1) == (0, 1, 2, 3)
    assert PLAN.ranks("absent", of_rank=1) == (1,)


def test_rejects_degrees_that_do_not_multiply_to_the_world_size() -> None:
    with pytest.raises(PlanError, match="cfg 2 x patch 2 = 4 ranks, but 3 are started"):
        require_world_size(PLAN, 3)


def test_rejects_a_repeated_axis_and_a_degree_of_zero() -> None:
    with pytest.raises(PlanError, match="repeat a name"):
        ParallelPlan(method="test", axes=(("cfg", 2), ("cfg", 2)))
    with pytest.raises(PlanError, match="degree 0 of axis 'cfg'"):
        ParallelPlan(method="test", axes=(("cfg", 0),))


def check_mesh(rank: int, world_size: int) -> None:
    mesh = Mesh(PLAN, rank=rank, device=torch.device("cpu"))
    for _ in range(2):  # before and after the groups are built again
        cfg, patch = mesh.axis("cfg"), mesh.axis("patch")
        assert (cfg.rank, patch.rank) == (rank // 2, rank % 2)
        assert all_gather(torch.tensor([rank]), dim=0, axis=patch).tolist() == list(patch.ranks)
        assert all_gather(torch.tensor([rank]), dim=0, axis=mesh.axis("cfg", "patch")).tolist() == [
            0,
            1,
            2,
            3,
        ]
        assert mesh.broadcast_signal(7 if rank == 0 else 0) == 7
        mesh.rebuild()
    mesh.destroy()


def test_mesh_gathers_along_its_axes_also_after_a_rebuild(
    run_on_ranks: Callable[..., None],
) -> None:
    run_on_ranks(check_mesh, 4)


def check_kept_axis(rank: int, world_size: int) -> None:
    """Both ranks keep an axis. Rank 1 closes its mesh, which must wake rank 0; after a rebuild the
    kept axis carries on.
    """
    mesh = Mesh(
        ParallelPlan(method="test", axes=(("patch", 2),)), rank=rank, device=torch.device("cpu")
    )
    kept = mesh.axis("patch")
    if rank == 1:
        mesh.destroy()
    else:
        with pytest.raises(RuntimeError, match=r"closed|reset"):
            all_gather(torch.tensor([rank]), dim=0, axis=kept)
    torch.distributed.barrier()
    mesh.rebuild()
    assert all_gather(torch.tensor([rank]), dim=0, axis=kept).tolist() == [0, 1]
    assert mesh.axis("patch") is kept
    mesh.destroy()


@pytest.mark.timeout(60)
def test_axis_that_is_kept_keeps_no_group_open_and_is_good_after_a_rebuild(
    run_on_ranks: Callable[..., None],
) -> None:
    run_on_ranks(check_kept_axis, 2)


def nested() -> list[Any]:
    """What JSON may hold and pickle cannot write."""
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


def check_teams(rank: int, world_size: int) -> None:
    """Two teams of two, of which only the second works, and a line from its first rank to rank
    0.
    """
    team, first = rank // 2, rank - rank % 2
    plan = ParallelPlan(method="test", axes=(("cfg", 1), ("patch", 2)))
    mesh = Mesh(plan, rank=rank % 2, device=torch.device("cpu"), team=team, num_teams=2)
    mesh.prepare()
    control, lines = control_of_team(2), open_channels()
    assert (control.ranks, control.rank) == ((first, first + 1), rank % 2)
    for _ in range(2):
        if team == 1:
            patch = mesh.axis("cfg", "patch")
            assert patch is mesh.axis("patch") and patch.ranks == (2, 3)
            assert all_gather(torch.tensor([rank]), dim=0, axis=patch).tolist() == [2, 3]
            assert mesh.broadcast_signal(7 if rank == 2 else 0) == 7
            assert broadcast_command(f"from {rank}", control) == "from 2"
            if rank == 2:
                with pytest.raises(UnsendableError, match="cannot be sent to the other ranks"):
                    broadcast_command(nested(), control)
            assert broadcast_command(f"again from {rank}", control) == "again from 2"
            assert gather_outcomes(rank, control) == [2, 3]
        mesh.rebuild()
    assert sorted(lines) == ([1, 2, 3] if rank == 0 else [0])
    if rank == 0:
        assert [lines[other].receive() for other in (2, 1, 3)] == [
            {"from": 2},
            {"from": 1},
            {"from": 3},
        ]
    else:
        with pytest.raises(UnsendableError, match="cannot be sent to the other ranks"):
            lines[0].send(nested())
        lines[0].send({"from": rank})
    mesh.destroy()


def test_team_works_alone_and_its_first_rank_talks_to_rank_0(
    run_on_ranks: Callable[..., None],
) -> None:
    run_on_ranks(check_teams, 4)


def check_failing_rank_wakes_the_others(rank: int, world_size: int) -> None:
    plan = ParallelPlan(method="test", axes=(("patch", world_size),))
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    failure = None
    if rank == 1:
        failure = "rank 1 gave up"
        mesh.destroy()
    else:
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=mesh.axis("patch").group)
    assert gather_outcomes(failure) == [
        None,
        "rank 1 gave up",
        None,
    ]  # the control group is as good as before
    mesh.rebuild()
    assert all_gather(torch.tensor([rank]), dim=0, axis=mesh.axis("patch")).tolist() == [0, 1, 2]
    mesh.destroy()


def test_a_rank_that_closes_its_groups_wakes_the_waiting_and_all_can_rebuild(
    run_on_ranks: Callable[..., None],
) -> None:
    run_on_ranks(check_failing_rank_wakes_the_others, 3)
