"""Degrees and options of AsyncDiff, chosen and checked before anything loads."""

from dataclasses import replace

import pytest

from backends.asyncdiff.plan import make_plan
from backends.errors import PlanError
from backends.model_table import read_table

TABLE = read_table()


def plan(world_size, name="sdxl", **options):
    return make_plan(TABLE[name], options, world_size)


@pytest.mark.parametrize(
    ("model_n", "stride", "world_size"),
    [(2, 1, 2), (2, 2, 3), (3, 1, 3), (3, 2, 4), (4, 1, 4), (4, 2, 5), (6, 1, 6)],
)
def test_allows_model_n_plus_stride_minus_one_ranks(model_n, stride, world_size):
    made = plan(world_size, model_n=model_n, stride=stride)
    assert made.degree("segment") == world_size and made.degree("cfg") == 1
    assert (made.options["model_n"], made.options["stride"]) == (model_n, stride)
    assert made.exactness == "approximate"


def test_rejects_ranks_that_do_not_fit():
    with pytest.raises(
        PlanError,
        match=(
            r"model_n=3 and stride=2 need 4 ranks \(model_n \+ stride - 1\), but 2 are started. "
            r"Start 4 with"
        ),
    ):
        plan(2, model_n=3, stride=2)


def test_rejects_a_stride_of_three():
    with pytest.raises(PlanError, match=r"stride=3 is not allowed. Allowed: 1, 2"):
        plan(4, stride=3)


def test_rejects_one_segment():
    with pytest.raises(PlanError, match=r"model_n=1 is not allowed. Allowed: 2 and more"):
        plan(2, model_n=1)


def test_rejects_one_segment_with_stride_two():
    with pytest.raises(PlanError, match=r"model_n=1 and stride=2 need 3 ranks"):
        plan(2, stride=2)


def test_rejects_a_single_rank():
    with pytest.raises(PlanError, match=r"needs at least 2 ranks, but 1 is started"):
        plan(1)


@pytest.mark.parametrize(
    ("world_size", "cfg", "model_n"),
    [(2, 1, 2), (3, 1, 3), (4, 2, 2), (5, 1, 5), (6, 2, 3), (8, 2, 4)],
)
def test_without_degrees_the_ranks_decide_and_the_reason_is_told(world_size, cfg, model_n):
    made = plan(world_size)
    assert (made.degree("cfg"), made.options["model_n"], made.options["stride"]) == (
        cfg,
        model_n,
        1,
    )
    assert any(reason.startswith(f"model_n={model_n}") for reason in made.reasons)
    assert any("use_cfg_parallel" in reason for reason in made.reasons) == (cfg == 2)


def test_the_missing_degree_follows_from_the_ranks():
    assert plan(3, model_n=2).options["stride"] == 2
    assert plan(4, stride=2).options["model_n"] == 3
    assert plan(4, model_n=4).options["stride"] == 1


def test_guidance_halves_and_segments_multiply():
    made = plan(4, model_n=2, stride=1, use_cfg_parallel=True)
    assert made.axes == (("cfg", 2), ("segment", 2))


def test_the_guidance_split_alone_is_exact():
    made = plan(2, use_cfg_parallel=True)
    assert made.axes == (("cfg", 2), ("segment", 1)) and made.exactness == "exact"


def test_rejects_the_guidance_split_on_an_odd_number_of_ranks():
    with pytest.raises(
        PlanError, match=r"use_cfg_parallel needs an even number of ranks, but 3 are started"
    ):
        plan(3, use_cfg_parallel=True)


def test_rejects_the_guidance_split_for_distilled_guidance():
    with pytest.raises(
        PlanError,
        match=r"use_cfg_parallel is not available for model type 'flux': its guidance is distilled",
    ):
        plan(4, name="flux", use_cfg_parallel=True)


def test_distilled_guidance_is_never_split_by_itself():
    assert plan(4, name="flux").axes == (("cfg", 1), ("segment", 4))


def test_synchronous_steps_have_a_default():
    assert plan(2).options["warmup_steps"] == 3
    assert plan(2, warmup_steps=0).options["warmup_steps"] == 0


def test_rejects_negative_synchronous_steps():
    with pytest.raises(PlanError, match=r"warmup_steps=-1 is not allowed"):
        plan(2, warmup_steps=-1)


def test_rejects_a_percentage_above_a_hundred():
    with pytest.raises(PlanError, match=r"synced_percent=120 is not allowed. Allowed: 0 to 100"):
        plan(2, synced_percent=120)


def test_segment_weights_are_read_from_text_or_a_list():
    assert plan(3, segment_weights="1,1,0.6").options["segment_weights"] == (1.0, 1.0, 0.6)
    assert plan(2, segment_weights=[1, 0.5]).options["segment_weights"] == (1.0, 0.5)
    assert plan(2).options["segment_weights"] is None


def test_rejects_weights_for_another_number_of_segments():
    with pytest.raises(
        PlanError, match=r"segment_weights='1,1,1' do not fit: 2 segments need 2 numbers above 0"
    ):
        plan(2, segment_weights="1,1,1")


def test_rejects_weights_that_are_no_numbers():
    with pytest.raises(
        PlanError, match=r"segment_weights='fast,slow' are not numbers. Give 2, such as 1,1"
    ):
        plan(2, segment_weights="fast,slow")


def test_guidance_in_three_parts_has_no_halves():
    spec = replace(TABLE["sdxl"], guidance="three")
    assert make_plan(spec, {}, 4).degree("cfg") == 1
    with pytest.raises(PlanError, match="its guidance is in three parts"):
        make_plan(spec, {"use_cfg_parallel": True}, 2)
