"""--shard and --encoder_placement: what is decided at start, and what is refused."""

import pytest

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.launch.command_line import parse_command_line
from hosts.launch.start_plan import StartPlan, plan_start
from tests.checkpoints import checkpoint

TABLE = read_table()
LARGE, MIDDLE, SMALL, LITTLE = 80 * 10**9, 5_440_000, 5_000_000, 4_680_000
"""Bytes of a GPU on which the tiny model fits, of one on which it does without a part of the text
encoders, with half of its denoiser too, and with no text encoder either.
"""
MODEL = checkpoint("sd3", num_layers=16)


def start(*arguments: str, gpu_memory: int | None = SMALL, ranks: int = 2) -> StartPlan:
    argv = [
        "--type=sd3",
        f"--checkpoint={MODEL}",
        f"--nproc_per_node={ranks}",
        *arguments,
    ]
    return plan_start(
        parse_command_line(argv),
        TABLE,
        num_gpus=0 if gpu_memory is None else 2,
        gpu_memory=gpu_memory,
    )


def test_weights_are_divided_only_where_they_do_not_fit() -> None:
    for unshared in (
        start(gpu_memory=LARGE),
        start(gpu_memory=None),
        start("--shard=never"),
        start(ranks=1),
    ):
        assert unshared.load.divided == ()
    divided = start()
    assert divided.load.divided == ("denoiser", "encoders")
    assert divided.teams.mode == "latency"
    assert any("the model needs about" in reason for reason in divided.reasons)
    assert start("--shard=always", gpu_memory=LARGE).load.divided == ("denoiser", "encoders")


def test_text_encoders_alone_are_divided_where_that_is_enough() -> None:
    found = start(gpu_memory=MIDDLE)
    assert found.load.divided == ("encoders",) and found.teams.mode == "latency"
    assert any("with encoders divided among 2 ranks" in reason for reason in found.reasons)
    assert all("run the same blocks" not in row.refusal for row in found.auto.rows)


def test_auto_takes_a_method_with_which_all_ranks_run_the_same_blocks() -> None:
    rows = {row.candidate.name: row for row in start().auto.rows}
    assert "all ranks must run the same blocks" in rows["asyncdiff segment 2 stride 1"].refusal
    assert "spread over 2 ranks" in rows["single"].refusal
    assert start().plan.runs_every_block and start().plan.world_size == 2
    whole = start(gpu_memory=LARGE).auto.rows
    one = {row.candidate.name: row for row in whole}["xdit cfg 2"].estimate
    other = rows["xdit cfg 2"].estimate
    assert other.memory_bytes < one.memory_bytes and other.step_s > one.step_s


@pytest.mark.parametrize(
    "arguments",
    [
        ("--backend=asyncdiff",),
        ("--backend=xdit", "--pipefusion_parallel_degree=2"),
    ],
)
def test_methods_that_split_the_denoiser_leave_the_text_encoders(arguments) -> None:
    found = start(*arguments)
    assert found.load.divided == ("encoders",) and found.plan.splits_weights_by


@pytest.mark.parametrize(
    "argument",
    [
        "--mode=throughput",
        "--enable_model_cpu_offload",
        "--compile_unet",
        "--compile_text_encoder",
        "--quantize_to=bnb,int8",
    ],
)
@pytest.mark.parametrize("asked", ["--shard=always", "--encoder_placement=one"])
def test_what_excludes_it_is_refused(asked, argument) -> None:
    name = argument.partition("=")[0].removesuffix("_unet").removesuffix("_text_encoder")
    words = {"--compile": "torch.compile", "--quantize_to": "bitsandbytes"}
    with pytest.raises(ConfigError, match=f"{asked} is not available with {words.get(name, name)}"):
        start(asked, argument)


def test_without_being_asked_it_says_why_it_does_not_divide() -> None:
    found = start("--mode=throughput")
    assert found.load.divided == ()
    assert any("that is not available with --mode=throughput" in why for why in found.reasons)


def needed(gpu_memory: int, *arguments: str, ranks: int = 2) -> tuple[object, ...]:
    found = start(*arguments, gpu_memory=gpu_memory, ranks=ranks)
    return found.load.divided, found.load.encoder_placement


def test_encoders_go_to_main_memory_where_that_is_enough_or_nothing_else_is() -> None:
    assert needed(LARGE, ranks=1) == ((), "every")
    assert needed(MIDDLE, ranks=1) == ((), "cpu")
    assert needed(MIDDLE, "--encoder_placement=every", ranks=1) == ((), "every")
    assert needed(MIDDLE) == (("encoders",), "every")
    assert needed(MIDDLE, "--shard=never") == ((), "cpu")
    assert needed(MIDDLE, "--shard=never", "--encoder_placement=every") == ((), "every")
    assert needed(LITTLE) == (("denoiser",), "cpu")
    assert needed(LITTLE, "--encoder_placement=one") == (("denoiser",), "one")


def test_a_model_that_may_not_fit_starts_and_says_what_it_would_take() -> None:
    found = start(gpu_memory=1000)
    assert found.load.divided == ("denoiser",) and found.load.encoder_placement == "cpu"
    (why,) = [why for why in found.reasons if "the model needs about" in why]
    assert "with denoiser divided among 2 ranks and the text encoders in main memory" in why
    assert "--quantize_to=int8 and --enable_model_cpu_offload take less" in why


def test_encoders_on_some_ranks_are_not_divided_and_ranks_stay_together() -> None:
    found = start("--encoder_placement=spread")
    assert found.load.divided == ("denoiser",)
    assert found.load.encoder_placement == "spread"
    placed = start("--encoder_placement=one", "--mode=auto", gpu_memory=LARGE)
    assert placed.load.encoder_placement == "one" and placed.teams.mode == "latency"
    assert start("--encoder_placement=one", ranks=1).load.encoder_placement == "every"
    assert start("--encoder_placement=cpu", ranks=1).load.encoder_placement == "cpu"


def test_one_rank_says_that_it_divides_nothing() -> None:
    found = start("--shard=always", ranks=1)
    assert any("--shard=always has no effect" in reason for reason in found.reasons)
