"""Quantising, compiling and memory options at start: what they become, what they say, what they
refuse.
"""

import pytest

from backends.errors import ConfigError, UnsupportedError
from backends.quantization_spec import QuantizationSpec
from backends.step_cache_spec import StepCacheSpec
from hosts.launch.option import COMPILE_BACKENDS, COMPILE_MODES
from tests.checkpoints import IP_ADAPTER_FILE, checkpoint, ip_adapter
from tests.hosts.launch.test_start_plan import plan

INT8, INT4 = QuantizationSpec(kind="int8"), QuantizationSpec(kind="int4")


def test_quantize_to_means_denoiser_and_encoders_and_the_split_forms_win():
    assert plan(quantize_to="int8").load.quantize == {"denoiser": INT8, "encoders": INT8}
    start = plan(
        quantize_to="int8",
        quantize_unet_to="int4",
        quantize_vae="int8",
        quantize_misc_to="int4",
    )
    assert start.load.quantize == {"denoiser": INT4, "encoders": INT8, "vae": INT8, "misc": INT4}
    assert plan().load.quantize == {}


def test_compile_switches_become_targets_and_one_image_is_made_before_the_host_is_ready():
    start = plan(
        compile_unet=True,
        compile_vae=True,
        compile_text_encoder=True,
        compile_mode="max-autotune",
        compile_fullgraph_off=True,
    )
    assert start.load.compile.targets == ("denoiser", "vae", "encoders")
    assert (start.load.compile.mode, start.load.compile.fullgraph) == ("max-autotune", False)
    assert start.load.prewarm_steps == 1
    assert any(
        "prewarm_steps=1: the first image compiles the model" in reason for reason in start.reasons
    )
    assert plan(compile_unet=True, prewarm_steps=5).load.prewarm_steps == 5
    assert plan().load.prewarm_steps == 0
    assert plan(compile_backend="eager").load.compile is None
    own = plan(compile_unet=True, compile_backend="eager", compile_options={"its_own": 1})
    assert own.load.compile.options == {"its_own": 1}  # which that backend knows
    both = plan(
        compile_unet=True,
        compile_mode="max-autotune",
        compile_options={"max_autotune": True},
        torch_cache_limit=3,
        torch_capture_scalar=True,
    )
    assert any(
        reason.startswith("--compile_mode has no effect: --compile_options")
        for reason in both.reasons
    )
    assert (
        both.load.compile.options,
        both.load.compile.cache_limit,
        both.load.compile.capture_scalar,
    ) == ({"max_autotune": True}, 3, True)


def test_asyncdiff_finds_its_units_before_the_host_is_ready():
    start = plan(num_ranks=2, backend="asyncdiff")
    assert start.load.prewarm_steps == 1
    assert any(
        reason.startswith("prewarm_steps=1: the first image finds") for reason in start.reasons
    )
    assert plan(num_ranks=2, backend="asyncdiff", prewarm_steps=0).load.prewarm_steps == 0
    assert plan(num_ranks=1, backend="asyncdiff").load.prewarm_steps == 0


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("enable_model_cpu_offload", "model"),
        ("enable_sequential_cpu_offload", "sequential"),
        ("enable_group_offload", "group"),
    ],
)
def test_offloading_without_a_gpu_is_said_to_have_no_effect(option, kind):
    start = plan(**{option: True})
    assert start.load.offload == kind
    assert (
        f"--{option} has no effect: there is no GPU, so all weights are in main memory"
        in start.reasons
    )
    assert not [
        reason for reason in plan(num_gpus=1, **{option: True}).reasons if "no GPU" in reason
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"quantize_to": "int3"},
            "--quantize_to=int3 is not allowed. Allowed: float8, int8, int4, int2, bnb,int8",
        ),
        (
            {"quantize_unet_to": "tao,int5"},
            "--quantize_unet_to=tao,int5 is not allowed. Allowed: tao,int8wo",
        ),
        (
            {"quantize_to": "int8", "gguf_model": __file__},
            "--gguf_model and --quantize_to were given, and both quantize the denoiser.",
        ),
        (
            {"enable_model_cpu_offload": True, "enable_group_offload": True},
            "--enable_model_cpu_offload and --enable_group_offload were given, but only one of "
            "them can be used.",
        ),
        (
            {"enable_group_offload": True, "compile_unet": True},
            "--enable_group_offload is not available with --compile_unet: torch.compile cannot",
        ),
        (
            {"enable_sequential_cpu_offload": True, "compile_vae": True},
            "--enable_sequential_cpu_offload is not available with --compile_vae: torch.compile",
        ),
        (
            {
                "backend": "asyncdiff",
                "nproc_per_node": 2,
                "shard_weights": True,
                "quantize_to": "int8",
            },
            "--quantize_to is not available with --shard_weights: packed weights cannot be cut.",
        ),
        (
            {
                "backend": "distrifuser",
                "nproc_per_node": 2,
                "parallelism": "tensor",
                "no_split_batch": True,
                "quantize_to": "int8",
            },
            "--quantize_to is not available with --parallelism=tensor: packed weights cannot be",
        ),
        (
            {
                "backend": "distrifuser",
                "nproc_per_node": 2,
                "parallelism": "tensor",
                "no_split_batch": True,
                "checkpoint": str(checkpoint("sdxl")),
                "ip_adapter": {str(ip_adapter("sdxl") / IP_ADAPTER_FILE): 1.0},
            },
            "--ip_adapter is not available with --parallelism=tensor: the attention of an",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        plan(**values)
    assert message in str(caught.value)


def test_lean_attention_is_for_the_backends_that_do_not_look_into_it():
    assert plan(
        num_ranks=2, backend="asyncdiff", enable_attention_slicing=True
    ).load.enable_attention_slicing
    assert plan(xformers_efficient=True).load.xformers_efficient
    adapted = plan(
        checkpoint=str(checkpoint("sdxl")),
        ip_adapter={str(ip_adapter("sdxl") / IP_ADAPTER_FILE): 1.0},
        enable_attention_slicing=True,
    )
    assert not adapted.load.enable_attention_slicing
    assert "--enable_attention_slicing has no effect: an IP-Adapter's attention is not sliced" in (
        adapted.reasons
    )
    for name in ("xformers_efficient", "enable_attention_slicing"):
        for backend in ("distrifuser", "xdit"):
            start = plan(num_ranks=2, backend=backend, **{name: True})
            assert not getattr(start.load, name)
            assert (
                f"--{name} has no effect: backend {backend!r} reaches the other ranks through "
                "torch's own attention" in start.reasons
            )


@pytest.fixture
def flux(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    return {"type": "flux", "checkpoint": str(tmp_path), "backend": "xdit", "num_ranks": 2}


def test_step_cache_makes_the_plan_approximate_and_says_so(flux):
    start = plan(**flux, step_cache="first_block")
    assert start.load.step_cache == StepCacheSpec(kind="first_block", value=0.08)
    assert start.facts()["exactness"] == "approximate"
    assert any(
        reason.startswith("results are approximate: step_cache=first_block,0.08 skips steps")
        for reason in start.reasons
    )
    assert plan(**flux).load.step_cache is None


def test_use_fbcache_of_old_clients_is_a_step_cache_where_there_can_be_one(flux):
    start = plan(**flux, use_fbcache=True)
    assert start.load.step_cache == StepCacheSpec(kind="first_block", value=0.08)
    assert any(
        reason.startswith("step_cache=first_block,0.08: that is what --use_fbcache means")
        for reason in start.facts()["reasons"]
    )
    for other in (flux | {"pipefusion_parallel_degree": 2}, {"backend": "xdit", "num_ranks": 2}):
        start = plan(**other, use_fbcache=True)
        assert start.load.step_cache is None
        reason = "--use_fbcache has no effect: it is for transformers without PipeFusion"
        assert reason in start.facts()["reasons"]


def test_rejects_step_caches_where_a_step_takes_values_of_the_one_before(flux):
    with pytest.raises(
        UnsupportedError, match=r"step_cache=first_block,0\.08 is not available with PipeFusion"
    ):
        plan(**flux, step_cache="first_block", pipefusion_parallel_degree=2)
    with pytest.raises(
        UnsupportedError,
        match=r"step_cache=deep,2 is not available with segments .* Use --step_cache=prediction,2",
    ):
        plan(num_ranks=2, backend="asyncdiff", step_cache="deep")
    start = plan(num_ranks=2, backend="asyncdiff", step_cache="prediction")
    assert start.load.step_cache == StepCacheSpec(kind="prediction", value=2)
    patches = {"num_ranks": 2, "backend": "distrifuser", "no_split_batch": True}
    with pytest.raises(UnsupportedError, match=r"step_cache=deep,2 is not available with patches"):
        plan(**patches, step_cache="deep", sync_mode="rotate")
    assert plan(**patches, step_cache="deep").load.step_cache is not None
    assert plan(num_ranks=2, backend="distrifuser", step_cache="deep").load.step_cache is not None


def test_names_for_compiling_are_torchs():
    import torch

    assert set(COMPILE_MODES) == set(torch._inductor.list_mode_options())
    assert set(COMPILE_BACKENDS) <= set(torch._dynamo.list_backends(None))
