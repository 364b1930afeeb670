"""GPUs as the launcher counts them, and what a launch makes of them."""

import pytest

from backends.errors import ConfigError
from backends.model_table import read_table
from backends.plan import ParallelPlan
from hosts.launch.gpus import (
    RANK_ENVIRONMENT,
    count_present,
    count_visible,
    default_variant,
    lowest_capability,
    require_queues,
)
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from hosts.ranks.libraries import set_library_defaults
from tests.checkpoints import checkpoint

TABLE = read_table()


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("0,2", 2),
        ("2, 0", 2),
        ("0,1,2,3", 3),
        ("0,-1,1", 1),
        ("0,9,1", 1),
        ("NoDevFiles", 0),
        ("GPU-1a,GPU-2b", 2),
        ("MIG-a,MIG-b", 1),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(visible, count):
    assert count_visible(3, visible) == count
    assert count_visible(0, visible) == 0


def test_machine_without_a_driver_has_no_gpu_and_no_capability():
    if not count_present():
        assert lowest_capability() is None


@pytest.mark.parametrize(
    ("type_name", "gpus", "capability", "variant"),
    [
        ("sdxl", 0, None, "fp32"),
        ("sdxl", 1, (9, 0), "fp16"),
        ("zimage", 1, (8, 0), "bf16"),
        ("zimage", 1, None, "bf16"),
        ("zimage", 1, (7, 5), "fp16"),
        ("flux", 2, (8, 9), "bf16"),
        ("flux2", 2, (12, 0), "bf16"),
        ("qwenimage", 2, (9, 0), "bf16"),
        ("wan_t2v", 2, (9, 0), "bf16"),
    ],
)
def test_numbers_are_those_that_the_type_is_published_in_where_the_card_has_them(
    type_name, gpus, capability, variant
):
    found, why = default_variant(TABLE[type_name], num_gpus=gpus, capability=capability)
    assert found == variant
    settings = Settings.from_values(
        {"type": type_name, "checkpoint": str(checkpoint(type_name)), "nproc_per_node": 1}
    )
    start = plan_start(settings, TABLE, num_gpus=gpus, capability=capability)
    assert start.load.variant == variant
    assert f"variant={variant}: {why}" in start.reasons


def test_named_variant_stays():
    settings = Settings.from_values(
        {"type": "zimage", "checkpoint": str(checkpoint("zimage")), "variant": "fp32"}
    )
    assert plan_start(settings, TABLE, num_gpus=1, capability=(9, 0)).load.variant == "fp32"


@pytest.mark.parametrize(
    "offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
)
@pytest.mark.parametrize(
    ("type_name", "options", "setting"),
    [
        (
            "sdxl",
            {"backend": "distrifuser", "parallelism": "tensor", "no_split_batch": True},
            "--parallelism=tensor",
        ),
        (
            "sdxl",
            {"backend": "asyncdiff", "use_cfg_parallel": False, "shard_weights": True},
            "--shard_weights",
        ),
        (
            "sd3",
            {"backend": "xdit", "pipefusion_parallel_degree": 2},
            "--pipefusion_parallel_degree",
        ),
        ("flux", {"backend": "xdit", "tensor_parallel_degree": 2}, "--tensor_parallel_degree"),
    ],
)
def test_offloading_of_split_weights_is_refused_at_start(type_name, options, setting, offload):
    values = {
        "type": type_name,
        "checkpoint": str(checkpoint(type_name)),
        "nproc_per_node": 2,
        offload: True,
        **options,
    }
    with pytest.raises(
        ConfigError, match=rf"--{offload} is not available with {setting}: .* Leave out one of them"
    ):
        plan_start(Settings.from_values(values), TABLE, num_gpus=2)


def test_offloading_leaves_split_weights_out_of_the_automatic_choice():
    values = {
        "type": "sd3",
        "checkpoint": str(checkpoint("sd3")),
        "nproc_per_node": 2,
        "backend": "auto",
        "enable_model_cpu_offload": True,
    }
    start = plan_start(Settings.from_values({**values, "quality": "fast"}), TABLE, num_gpus=2)
    assert not start.plan.splits_weights_by
    refused = {row.candidate.name: row.refusal for row in start.auto.rows}
    assert "not available with --pipefusion_parallel_degree" in refused["xdit pipefusion 2"]


def test_one_hardware_queue_is_refused_where_stages_would_hang_and_set_wider_by_default():
    stages = ParallelPlan(method="xdit", axes=(("stage", 2),))
    with pytest.raises(
        ConfigError,
        match=("CUDA_DEVICE_MAX_CONNECTIONS=1 is set, with which the 2 stages of xdit would hang"),
    ):
        require_queues(stages, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    require_queues(stages, RANK_ENVIRONMENT)
    assert RANK_ENVIRONMENT["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    require_queues(
        ParallelPlan(method="xdit", axes=(("ulysses", 2),)), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    )


def test_failed_operations_are_left_to_our_own_watch_unless_the_user_says_otherwise():
    """torch would end the process a minute after another rank's abort."""
    environ = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    set_library_defaults(environ)
    assert environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "0"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        ("PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
    ],
)
def test_what_the_user_set_under_another_name_is_not_overruled(theirs, ours):
    environ = {theirs: "what the user wants"}
    set_library_defaults(environ)
    assert ours not in environ
    assert environ[theirs] == "what the user wants"
