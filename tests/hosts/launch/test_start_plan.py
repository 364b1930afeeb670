"""What is decided, and refused, before any process starts."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from backends.errors import ConfigError, PlanError, UnsupportedError
from backends.model_table import read_table
from hosts.launch.gpus import count_gpus
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from tests.checkpoints import NAMES, checkpoint, controlnet, ip_adapter
from tests.checkpoints.adapters import IP_ADAPTER_FILE
from tests.hosts.harness import REPOSITORY

TABLE = read_table()


def plan(num_gpus=0, num_ranks=None, **values):
    return plan_start(
        Settings.from_values({"type": "sdxl", **values}),
        TABLE,
        num_gpus=num_gpus,
        num_ranks=num_ranks,
    )


def test_nothing_given_is_the_demo_model_on_one_rank_of_the_cpu():
    start = plan()
    assert (start.num_ranks, start.plan.method, start.load.variant) == (1, "single", "fp32")
    assert start.load.checkpoint.endswith("demo/checkpoint")
    assert (start.spec.height, start.spec.width) == (
        TABLE["sdxl"].demo["height"],
        TABLE["sdxl"].demo["width"],
    )
    assert [reason.partition(":")[0] for reason in start.reasons] == [
        "ranks=1",
        "backend=single",
        "checkpoint",
        "variant=fp32",
    ]


def test_visible_gpus_decide_ranks_and_variant():
    start = plan(num_gpus=2)
    assert (start.num_ranks, start.plan.method, start.load.variant) == (
        2,
        next(iter(TABLE["sdxl"].backends)),
        "fp16",
    )


def test_backend_asked_for_on_one_rank_is_single_and_says_so():
    start = plan(backend="xdit")
    assert start.plan.method == "single"
    assert "one rank: backend xdit computes what single does" in start.reasons


def test_option_of_another_backend_is_said_to_have_no_effect():
    start = plan(
        num_ranks=2, backend="distrifuser", model_n=2, time_shift=True, sync_mode="full_sync"
    )
    without = [reason for reason in start.reasons if "has no effect" in reason]
    assert without == [
        "--model_n has no effect: it is for backend asyncdiff",
        "--time_shift has no effect: it is for backend asyncdiff",
    ]
    assert start.plan.options["sync_mode"] == "full_sync"


def test_option_not_given_is_left_to_the_backend():
    assert plan(num_ranks=4, backend="asyncdiff").plan.degree("cfg") == 2
    assert plan(num_ranks=3, backend="asyncdiff", use_cfg_parallel=False).plan.degree("cfg") == 1


def test_gpus_are_counted_without_torch_and_as_the_environment_hides_them(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: ["0", "1", "2"])
    assert count_gpus({}) == 3
    assert [
        count_gpus({"CUDA_VISIBLE_DEVICES": value}) for value in ("0,2", "", "-1", "0,1,2,3")
    ] == [2, 0, 0, 3]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"type": None},
            ConfigError,
            "--type is missing. Give it, or a --checkpoint that says what it is. Allowed: ",
        ),
        (
            {"type": "sdxl", "host": "0.0.0.0"},
            ConfigError,
            "--host=0.0.0.0 can be reached from other machines, so requests need a key. Give ",
        ),
        (
            {"type": "sdxxl"},
            ConfigError,
            "type='sdxxl' is not a model type. Did you mean 'sdxl'? Allowed: ",
        ),
        ({"type": "flux"}, ConfigError, "--checkpoint is missing: type 'flux' has no demo model."),
        ({"checkpoint": "/no/such"}, ConfigError, "--checkpoint=/no/such does not exist."),
        ({"vae": "/no/such"}, ConfigError, "--vae=/no/such does not exist."),
        ({"checkpoint": "/"}, ConfigError, "holds no model_index.json"),
        (
            {"type": "hy", "checkpoint": __file__},
            ConfigError,
            "is a file, but type 'hy' needs a folder",
        ),
        (
            {"scheduler": "eulr"},
            ConfigError,
            "--scheduler: scheduler='eulr' is not a scheduler. Did you mean 'euler'?",
        ),
        (
            {"nproc_per_node": 3, "num_gpus": 2},
            ConfigError,
            "--nproc_per_node=3 is more than the 2 visible GPUs.",
        ),
        ({"num_ranks": 2, "backend": "single"}, PlanError, "backend 'single' runs on one rank"),
        ({"num_ranks": 3, "backend": "asyncdiff", "model_n": 2}, None, None),
        (
            {"num_ranks": 2, "backend": "asyncdiff", "model_n": 4},
            PlanError,
            "model_n=4 and stride=1 need 4 ranks",
        ),
    ],
)
def test_what_does_not_fit_is_refused(values, kind, message):
    if kind is None:
        assert plan(**values).plan.options["stride"] == 2
        return
    with pytest.raises(kind) as caught:
        plan(**values)
    assert message in str(caught.value)


def test_epsilon_only_scheduler_is_refused_for_a_flow_matching_model_at_start():
    for type_name in ("sd3", "flux"):
        with pytest.raises(
            ConfigError,
            match=(
                r"--scheduler: scheduler='ddim' cannot sample a flow-matching model\. Allowed "
                r"for this model: "
            ),
        ):
            plan(type=type_name, checkpoint=str(checkpoint(type_name)), scheduler="ddim")
        plan(
            type=type_name, checkpoint=str(checkpoint(type_name)), scheduler="euler"
        )  # mapped to its counterpart


def test_a_sampler_that_the_class_cannot_use_is_refused_at_start():
    with pytest.raises(
        ConfigError,
        match=r"--scheduler: scheduler='heun' .*: Krea2Pipeline gives mu and sigmas .*: euler, lcm",
    ):
        plan(type="krea2", checkpoint=str(checkpoint("krea2")), scheduler="heun")


def test_the_checkpoints_own_sampler_is_known_and_settings_that_it_lacks_are_told():
    start = plan(scheduler={"solver_order": 3})
    assert start.spec.sampler["_class_name"] == "EulerDiscreteScheduler"
    assert "--scheduler: solver_order has no effect with the checkpoint" in start.reasons
    start = plan(scheduler={"scheduler": "ddim", "use_karras_sigmas": True})
    assert "--scheduler: use_karras_sigmas has no effect with ddim" in start.reasons


def test_flow_matching_scheduler_is_refused_for_another_model_at_start():
    with pytest.raises(
        ConfigError, match="--scheduler: scheduler='fm_euler' is for flow-matching models only"
    ):
        plan(scheduler="fm_euler")


def test_backend_that_the_table_rules_out_is_refused_with_its_reason():
    ruled_out = [
        (name, backend)
        for name, spec in TABLE.items()
        if name in NAMES  # their checkpoints are there already
        for backend in ("asyncdiff", "distrifuser", "xdit")
        if backend not in spec.backends
    ]
    for type_name, backend in ruled_out:
        with pytest.raises(
            UnsupportedError, match=f"model type '{type_name}' has no backend '{backend}'"
        ):
            plan(
                type=type_name, checkpoint=str(checkpoint(type_name)), num_ranks=2, backend=backend
            )
    assert ruled_out


def test_type_that_needs_a_motion_adapter_takes_the_checkpoints_own_or_asks(tmp_path):
    assert plan(type="ad", checkpoint=str(checkpoint("ad"))).num_ranks == 1
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="type 'ad' needs a motion_adapter, and the checkpoint holds none"
    ):
        plan(type="ad", checkpoint=str(tmp_path))


def test_paths_are_made_absolute_and_plain(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model_index.json").write_text("{}")
    (tmp_path / "nodes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert plan(checkpoint="nodes/../models").load.checkpoint == str(tmp_path / "models")


def test_facts_are_json():
    facts = json.loads(json.dumps(plan(num_ranks=2).facts()))
    assert (facts["ranks"], facts["type"]) == (2, "sdxl")


def adapters(tmp_path):
    """LoRAs that nobody compares with the model at start, a ControlNet and an IP-Adapter."""
    for name in ("a.safetensors", "b.v2.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    (tmp_path / "ip").symlink_to(ip_adapter("sdxl"))
    (tmp_path / "net").symlink_to(controlnet("sdxl"))
    return tmp_path


def test_adapters_are_found_in_the_order_given_and_with_their_scales(tmp_path):
    folder, model = adapters(tmp_path), str(checkpoint("sdxl"))
    load = plan(
        checkpoint=model,
        lora={f"{folder}/net/../b.v2.safetensors": -0.5, f"{folder}/a.safetensors": 0.8},
        control_net=str(folder / "net"),
        ip_adapter={f"{folder}/ip/{IP_ADAPTER_FILE}": 0.6},
    ).load
    assert list(load.lora.items()) == [
        (f"{folder}/b.v2.safetensors", -0.5),
        (f"{folder}/a.safetensors", 0.8),
    ]
    assert load.control_net == {f"{folder}/net": 1.0}
    assert load.ip_adapter == {f"{folder}/ip/{IP_ADAPTER_FILE}": 0.6}
    scaled = plan(
        checkpoint=model, control_net=str(folder / "net"), controlnet_scale=0.3
    ).load.control_net
    assert scaled == {f"{folder}/net": 0.3}


def test_motion_options_of_a_type_without_motion_have_no_effect_and_say_so(tmp_path):
    folder = adapters(tmp_path)
    start = plan(motion_adapter_lora=f"{folder}/a.safetensors")
    assert start.load.motion_lora == {}
    assert "--motion_adapter_lora has no effect: type 'sdxl' has no motion adapter" in start.reasons


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"lora": "nothing.safetensors"},
            ConfigError,
            "--lora=nothing.safetensors does not exist.",
        ),
        ({"lora": "net"}, ConfigError, "is a folder. Give the file of weights in it"),
        (
            {"lora": "readme.txt"},
            ConfigError,
            "is not a file of weights. Allowed: .safetensors, .sft, .bin, .pt, .pth, .ckpt.",
        ),
        (
            {"lora": {"a.safetensors": float("inf")}},
            ConfigError,
            "and a.safetensors has scale inf.",
        ),
        (
            {"type": "sdup", "control_net": "net"},
            UnsupportedError,
            "controlnet with backend 'single' is not available for model type 'sdup'",
        ),
        (
            {"type": "hy", "ip_adapter": "ip.bin"},
            UnsupportedError,
            "ip_adapter with backend 'single' is not available for model type 'hy'",
        ),
        (
            {"type": "pixa", "gguf_model": "a.safetensors"},
            UnsupportedError,
            "gguf with backend 'single' is not available",
        ),
        (
            {"transformer": "net"},
            ConfigError,
            "--transformer was given, but type 'sdxl' has a unet. Give --unet.",
        ),
        (
            {"unet": "net", "gguf_model": "a.safetensors"},
            ConfigError,
            "--unet and --gguf_model were given, and both replace the unet.",
        ),
    ],
)
def test_adapters_that_cannot_be_meant_are_refused(values, kind, message, tmp_path, monkeypatch):
    (adapters(tmp_path) / "readme.txt").write_text("no weights")
    monkeypatch.chdir(tmp_path)
    values = {"type": "sdxl", **values}
    with pytest.raises(kind) as caught:
        plan(**values, checkpoint=str(checkpoint(values["type"])))
    assert message in str(caught.value)


def test_rank_imports_bitsandbytes_without_inductor_and_leaves_torchs_switch_as_it_was():
    pytest.importorskip("bitsandbytes")
    script = """
import os, sys
from hosts.ranks.libraries import DISABLES_DYNAMO, import_bitsandbytes
for given in (None, "0"):
    os.environ.update({} if given is None else {DISABLES_DYNAMO: given})
    import_bitsandbytes(os.environ)
    assert os.environ.get(DISABLES_DYNAMO) == given
assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
