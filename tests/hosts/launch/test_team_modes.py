"""--mode: which teams the ranks may form, and what is refused."""

import pytest

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from tests.checkpoints import checkpoint


def teams(*, ranks=4, type_name="sdxl", **options):
    settings = Settings.from_values(
        {"type": type_name, "checkpoint": str(checkpoint(type_name)), **options}
    )
    return plan_start(settings, read_table(), num_gpus=0, num_ranks=ranks)


@pytest.mark.parametrize(("ranks", "sizes"), [(2, [1]), (3, [1]), (4, [1, 2]), (6, [1, 2, 3])])
def test_ranks_may_form_teams_of_each_size_that_divides_their_number(ranks, sizes):
    start = teams(ranks=ranks, backend="distrifuser")
    assert start.teams.mode == "auto" and list(start.teams.plans) == sizes
    assert [plan.world_size for plan in start.teams.plans.values()] == sizes
    assert start.teams.plans[1].method == "single"
    assert (
        start.facts()["mode"] == "auto"
        and start.facts()["teams"]["1"] == "single: one rank (exact)"
    )


def test_degrees_that_were_given_for_all_ranks_leave_only_teams_of_one():
    assert list(teams(type_name="flux", backend="xdit", ulysses_degree=4).teams.plans) == [1]


def test_latency_mode_and_one_rank_have_no_teams():
    start = teams(backend="distrifuser", mode="latency")
    assert (
        not start.teams.plans
        and "mode=latency: all ranks work on each job, as requested" in start.facts()["reasons"]
    )
    assert not teams(ranks=1, mode="throughput").teams.plans


def test_throughput_mode_has_teams_of_one():
    assert list(teams(backend="distrifuser", mode="throughput").teams.plans) == [1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"backend": "asyncdiff", "shard_weights": True},
            "with --shard_weights each rank holds only a part of the weights",
        ),
        (
            {"backend": "distrifuser", "parallelism": "tensor"},
            "with --parallelism=tensor each rank holds only a part of the weights",
        ),
        (
            {"backend": "xdit", "type_name": "flux", "pipefusion_parallel_degree": 4},
            "with --pipefusion_parallel_degree each rank holds only a part of the weights",
        ),
        (
            {"backend": "xdit", "type_name": "flux", "tensor_parallel_degree": 4},
            "with --tensor_parallel_degree each rank holds only a part of the weights",
        ),
        (
            {"backend": "distrifuser", "compile_unet": True},
            "compiled models would be compiled again whenever ranks split or rejoin "
            "(--compile_unet, --compile_vae, --compile_text_encoder)",
        ),
    ],
)
def test_what_ties_ranks_together_makes_auto_latency_and_refuses_throughput(options, problem):
    start = teams(**options)
    assert (start.teams.mode, start.teams.plans) == ("latency", {})
    assert f"mode=latency: {problem}" in start.facts()["reasons"]
    with pytest.raises(ConfigError) as caught:
        teams(mode="throughput", **options)
    assert (
        str(caught.value)
        == f"--mode=throughput is not available: {problem}. Leave out one of the two."
    )
