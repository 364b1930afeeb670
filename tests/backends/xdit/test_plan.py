"""Degrees of the xdit backend: what is chosen, what is refused, and what the messages propose. No
ranks.
"""

import json
import math
from dataclasses import replace

import pytest

from backends.errors import PlanError
from backends.model_table import read_table
from backends.xdit.plan import make_plan

TABLE = read_table()


def checkpoint_with(folder, **config):
    """A folder that holds as much of a checkpoint as planning reads."""
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("name", "world_size", "axes"),
    [
        ("sd3", 2, {"cfg": 2}),
        ("sd3", 4, {"cfg": 2, "ulysses": 2}),
        ("sd3", 3, {"ulysses": 3}),
        ("flux", 4, {"ulysses": 4}),
        ("sdxl", 2, {"cfg": 2}),
        ("pixs", 1, {}),
    ],
)
def test_without_degrees_guidance_is_split_first_then_heads(name, world_size, axes):
    plan = make_plan(TABLE[name], {}, world_size)
    assert dict(plan.axes) == axes
    assert plan.exactness == "exact"
    assert len(plan.reasons) == len(axes)


def test_ring_takes_what_heads_do_not_divide_by(tmp_path):
    plan = make_plan(
        TABLE["flux"], {"checkpoint": checkpoint_with(tmp_path, num_attention_heads=6)}, 4
    )
    assert dict(plan.axes) == {"ring": 2, "ulysses": 2}
    assert plan.exactness == "reordered"
    assert "6 heads do not divide by 4" in plan.reasons[-1]


def test_product_that_is_not_the_world_size_proposes_sets_that_are():
    with pytest.raises(
        PlanError, match="--ulysses_degree 3 = 3 ranks, but 4 are started"
    ) as caught:
        make_plan(TABLE["sd3"], {"ulysses_degree": 3}, 4)
    proposed = str(caught.value).partition("Allowed for 4: ")[2].removesuffix(".").split("; ")
    assert "--use_cfg_parallel --ulysses_degree=2" in proposed
    for flags in proposed:  # every proposal is accepted
        options = {
            name: int(value) if value else True
            for name, _, value in (flag[2:].partition("=") for flag in flags.split())
        }
        assert make_plan(TABLE["sd3"], options, 4).world_size == 4


def test_degrees_of_one_count_as_given():
    with pytest.raises(PlanError, match="no degree above 1 = 1 ranks, but 2 are started"):
        make_plan(TABLE["sd3"], {"ulysses_degree": 1, "ring_degree": 1}, 2)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_rejects_a_degree_that_is_no_whole_number_from_one(value):
    with pytest.raises(
        PlanError, match=r"ulysses_degree=.* is not allowed. Allowed: whole numbers from 1"
    ):
        make_plan(TABLE["sd3"], {"ulysses_degree": value}, 2)


def test_rejects_cfg_parallel_where_guidance_is_distilled():
    with pytest.raises(
        PlanError,
        match=(
            r"'flux': its guidance is distilled, there are no two halves. Allowed for 2 ranks: "
            r".*ulysses"
        ),
    ):
        make_plan(TABLE["flux"], {"use_cfg_parallel": True}, 2)


def test_rejects_to_spread_a_unet():
    with pytest.raises(
        PlanError, match=r"'sdxl' has a UNet, .* Allowed for 2 ranks: --use_cfg_parallel"
    ):
        make_plan(TABLE["sdxl"], {"ulysses_degree": 2}, 2)


def test_unet_whose_levels_have_numbers_of_heads_of_their_own(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"num_attention_heads": [2, 4]}')
    plan = make_plan(TABLE["sdxl"], {"checkpoint": str(tmp_path)}, 2)
    assert dict(plan.axes) == {"cfg": 2}


@pytest.mark.parametrize(
    ("name", "pipeline", "message"),
    [
        ("flux2_klein", "Flux2KleinKVPipeline", "keeps the keys of its reference images"),
        ("sd3", "StableDiffusion3PAGPipeline", "masks its attention to perturb it"),
        ("flux", "GlmImagePipeline", "reads the words in quotation marks"),
    ],
)
def test_rejects_to_spread_tokens_of_pipelines_that_need_all(name, pipeline, message):
    spec = replace(TABLE[name], pipeline=pipeline)
    with pytest.raises(PlanError, match=message):
        make_plan(spec, {"ulysses_degree": 2}, 2)


def test_unet_on_three_ranks_proposes_another_backend():
    with pytest.raises(PlanError, match=r"3 are started. Allowed for 3: none for this model type"):
        make_plan(TABLE["sdxl"], {}, 3)


def test_rejects_more_ulysses_ranks_than_heads(tmp_path):
    options = {"checkpoint": checkpoint_with(tmp_path, num_attention_heads=2), "ulysses_degree": 4}
    with pytest.raises(PlanError, match="ulysses_degree=4 is more than the 2 attention heads"):
        make_plan(TABLE["sd3"], options, 4)


def test_rejects_pipefusion_where_blocks_skip_over_stages(tmp_path):
    options = {
        "checkpoint": checkpoint_with(tmp_path, _class_name="HunyuanDiT2DModel"),
        "pipefusion_parallel_degree": 2,
    }
    with pytest.raises(
        PlanError,
        match="not available for type 'hy': its later blocks read skip connections",
    ):
        make_plan(TABLE["hy"], options, 2)


def test_rejects_pipefusion_for_classes_that_it_does_not_cut(tmp_path):
    options = {
        "checkpoint": checkpoint_with(tmp_path, _class_name="WanTransformer3DModel"),
        "pipefusion_parallel_degree": 2,
    }
    with pytest.raises(
        PlanError,
        match=(
            r"not available for a WanTransformer3DModel: PipeFusion cuts "
            r"FluxTransformer2DModel, "
            r".* only"
        ),
    ):
        make_plan(TABLE["wan_t2v"], options, 2)


def test_no_cfg_split_by_default_where_guidance_is_off_by_default():
    assert dict(make_plan(TABLE["zimage"], {}, 2).axes) == {"ulysses": 2}
    assert dict(make_plan(TABLE["zimage"], {"use_cfg_parallel": True}, 2).axes) == {"cfg": 2}


def test_rejects_more_stages_than_blocks(tmp_path):
    options = {
        "checkpoint": checkpoint_with(tmp_path, num_layers=2, num_single_layers=1),
        "pipefusion_parallel_degree": 4,
    }
    with pytest.raises(
        PlanError, match="pipefusion_parallel_degree=4 is more than the 3 transformer blocks"
    ):
        make_plan(TABLE["flux"], options, 4)


def test_allows_tensor_parallelism_where_diffusers_has_a_plan(tmp_path):
    options = {
        "checkpoint": checkpoint_with(
            tmp_path, _class_name="FluxTransformer2DModel", num_attention_heads=4
        )
    }
    plan = make_plan(
        TABLE["flux"], {**options, "tensor_parallel_degree": 2, "ulysses_degree": 2}, 4
    )
    assert dict(plan.axes) == {"ulysses": 2, "tensor": 2}
    assert plan.exactness == "reordered"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sd3",
            {"tensor_parallel_degree": 2},
            "not available for type 'sd3': diffusers has no tensor plan for its transformer",
        ),
        (
            "flux",
            {"tensor_parallel_degree": 8},
            "tensor_parallel_degree=8 does not divide the 4 attention heads",
        ),
        (
            "flux",
            {"tensor_parallel_degree": 2, "ulysses_degree": 4},
            "ulysses_degree=4 is more than the 2 attention heads",
        ),
        (
            "flux",
            {"tensor_parallel_degree": 2, "pipefusion_parallel_degree": 2},
            "both give up weights, and are not available together",
        ),
    ],
)
def test_rejects_tensor_parallelism_that_does_not_fit(tmp_path, name, options, message):
    class_name = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}[name]
    folder = checkpoint_with(tmp_path, _class_name=class_name, num_attention_heads=4)
    with pytest.raises(PlanError, match=message):
        make_plan(TABLE[name], {**options, "checkpoint": folder}, math.prod(options.values()))


def test_pipefusion_is_approximate_and_says_how_many_patches_it_chose():
    plan = make_plan(TABLE["sd3"], {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True}, 4)
    assert plan.exactness == "approximate"
    assert plan.options == {
        "num_pipeline_patch": 4,
        "warmup_steps": 1,
        "attn_layer_num_for_pp": None,
    }
    assert any(reason.startswith("num_pipeline_patch=4") for reason in plan.reasons)
    assert (
        make_plan(TABLE["sd3"], {"pipefusion_parallel_degree": 2}, 2).options["num_pipeline_patch"]
        == 2
    )


def test_rejects_pipefusion_without_a_synchronous_step():
    with pytest.raises(
        PlanError, match=r"warmup_steps=0 is not allowed. Allowed: whole numbers from 1"
    ):
        make_plan(TABLE["sd3"], {"pipefusion_parallel_degree": 2, "warmup_steps": 0}, 2)


@pytest.mark.parametrize("value", ["3,1", "3 1", [3, 1]])
def test_allows_blocks_per_stage_as_text_or_list(tmp_path, value):
    options = {
        "checkpoint": checkpoint_with(tmp_path, num_layers=4),
        "pipefusion_parallel_degree": 2,
        "attn_layer_num_for_pp": value,
    }
    assert make_plan(TABLE["sd3"], options, 2).options["attn_layer_num_for_pp"] == (3, 1)


@pytest.mark.parametrize("value", ["3,2", "4", "4,0", [1, 1, 2]])
def test_rejects_blocks_per_stage_that_do_not_add_up(tmp_path, value):
    options = {
        "checkpoint": checkpoint_with(tmp_path, num_layers=4),
        "pipefusion_parallel_degree": 2,
        "attn_layer_num_for_pp": value,
    }
    with pytest.raises(PlanError, match=r"does not fit. Allowed: 2 numbers from 1, together 4"):
        make_plan(TABLE["sd3"], options, 2)


def test_rejects_blocks_per_stage_that_are_no_numbers():
    options = {"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": "many"}
    with pytest.raises(
        PlanError, match="attn_layer_num_for_pp='many' is not a list of whole numbers"
    ):
        make_plan(TABLE["sd3"], options, 2)
