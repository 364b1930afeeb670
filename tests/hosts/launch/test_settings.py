"""Launch arguments: the tolerant parser for the existing clients, and the strict one of the
launcher.
"""

import logging
from pathlib import Path

import pytest
import torch._inductor

from backends.errors import ConfigError
from hosts.compat.args import NO_EFFECT, parse_client_arguments, settings_or_problem
from hosts.launch import settings as settings_module
from hosts.launch.command_line import parse_command_line
from hosts.launch.option import SECTIONS, require_inductor_options
from hosts.launch.readme import arguments_page
from hosts.launch.settings import Settings, canonical_names, options
from tests.checkpoints import checkpoint
from tests.hosts.launch.test_start_plan import plan

BACKENDS = ("asyncdiff", "distrifuser", "xdit")
GOLDEN = {
    "ComfyUI asyncdiff": [
        "--port=6000", "--variant=fp16", "--width=1024", "--height=1024", "--enable_vae_tiling",
        "--quantize_encoder_to=int8",
        "--warm_up_steps=10", '--scheduler={"scheduler": "dpmpp_2m", "use_karras_sigmas": true}',
        '--lora={"/c/custom_nodes/../models/loras/a.safetensors": 0.8}',
        "--checkpoint=/c/custom_nodes/../models/checkpoints/sdxl",
        "--type=sdxl", "--model_n=2", "--stride=1",
    ],
    "ComfyUI distrifuser": [
        "--port=6000", "--variant=fp16", "--width=1024", "--height=1024", "--warm_up_steps=10",
        "--checkpoint=/m/sdxl", "--type=sdxl",
        "--model_n=2", "--stride=1", "--parallelism=patch", "--sync_mode=corrected_async_gn",
        "--no_cuda_graph",
    ],
    "ComfyUI xdit": [
        "--port=6000", "--variant=bf16", "--width=1024", "--height=1024", "--warm_up_steps=10",
        "--checkpoint=/m/flux", "--type=flux",
        "--pipefusion_parallel_degree=2", "--tensor_parallel_degree=1", "--data_parallel_degree=1",
        "--ulysses_degree=1",
        "--ring_degree=1", "--gguf_model=/m/flux-q8.gguf",
    ],
    "LocalAI bf13466": [
        "--port=6000", "--checkpoint=/models/sdxl", "--type=sdxl", "--height=512", "--width=512",
        "--variant=fp16", "--model_n=3",
        "--stride=2", '--lora={"/l/x.safetensors": 1.0}', '--scheduler={"scheduler": "ddim"}',
    ],
    "LocalAI 5fe46a1": [
        "--port=51290", "--checkpoint=/models/sdxl", "--type=sdxl", "--enable_vae_tiling",
        "--enable_vae_slicing", "--variant=fp16",
        "--time_shift", "--model_n=3", "--stride=2", "--synced_percent=12.5",
        '--scheduler={"scheduler": "heun", "timestep_spacing": "trailing"}',
    ],
}  # fmt: skip
EXPECTED = {
    "ComfyUI asyncdiff": {
        "width": 1024, "height": 1024, "enable_vae_tiling": True, "quantize_encoder_to": "int8",
        "warm_up_steps": 10,
        "scheduler": {"scheduler": "dpmpp_2m", "use_karras_sigmas": True}, "model_n": 2,
        "stride": 1, "variant": "fp16",
        "lora": {"/c/custom_nodes/../models/loras/a.safetensors": 0.8},
        "checkpoint": "/c/custom_nodes/../models/checkpoints/sdxl",
    },
    "ComfyUI distrifuser": {"parallelism": "patch", "sync_mode": "corrected_async_gn",
        "warm_up_steps": 10, "checkpoint": "/m/sdxl"},
    "ComfyUI xdit": {"variant": "bf16", "type": "flux", "pipefusion_parallel_degree": 2,
        "ring_degree": 1,
        "gguf_model": "/m/flux-q8.gguf"},
    "LocalAI bf13466": {"height": 512, "model_n": 3, "stride": 2, "lora": {"/l/x.safetensors": 1.0},
        "scheduler": {"scheduler": "ddim"}},
    "LocalAI 5fe46a1": {
        "port": 51290, "enable_vae_tiling": True, "enable_vae_slicing": True, "time_shift": True,
        "synced_percent": 12.5,
        "scheduler": {"scheduler": "heun", "timestep_spacing": "trailing"},
    },
}  # fmt: skip


def parse_for_asyncdiff(argv):
    return parse_client_arguments(argv, backend="asyncdiff")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_command_line_parses_on_each_backend(name, backend, caplog):
    settings = parse_client_arguments(GOLDEN[name], backend=backend)
    assert settings.backend == backend
    assert {key: getattr(settings, key) for key in EXPECTED[name]} == EXPECTED[name]
    said = [record.getMessage() for record in caplog.records]
    assert all(text.startswith("--no_cuda_graph has no effect: ") for text in said)


@pytest.mark.parametrize(
    ("token", "warning"),
    [
        ("--use_ray", "--use_ray is not an argument"),
        ("--dit_parallel_size=2", "--dit_parallel_size is not an argument"),
        ("stray", "'stray' is not an argument"),
        ("--check_nothing=1", "--check_nothing is not an argument"),
        *[(f"--{name}=1", f"--{name} has no effect: ") for name in NO_EFFECT],
        ("--quantize_tokenizer=bnb,int8", "--quantize_tokenizer has no effect"),
        ("--no_cuda_graph", "--no_cuda_graph has no effect"),
        ("--warm_up=2", "--warm_up has no effect: it is for backend asyncdiff"),
    ],
)
def test_client_arguments_that_mean_nothing_here_only_warn(token, warning, caplog):
    settings = parse_client_arguments(["--port=6001", "--type=sdxl", token], backend="xdit")
    assert (settings.port, settings.type) == (6001, "sdxl")
    assert [warning in record.getMessage() for record in caplog.records] == [True]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    "token",
    [
        "--gguf_model",
        "--gguf_model=",
        "--lora=None",
        "--quantize_to=disabled",
        "--compile_mode=default",
    ],
)
def test_client_values_that_say_nothing_count_as_not_given(token):
    settings = parse_client_arguments(["--type=sdxl", token], backend="asyncdiff")
    assert set(settings.given) == {"type", "backend", "image_dirs"}


def test_compile_options_are_those_that_torch_knows():
    known = {key: None for key in torch._inductor.list_options() if key != "TYPE_CHECKING"}
    require_inductor_options(known)
    with pytest.raises(
        ConfigError, match=r"triton.cudagraph is not one .closest: triton.cudagraph"
    ):
        require_inductor_options({"triton.cudagraph": True})


@pytest.mark.parametrize(
    "token",
    [
        "--time_shift",
        "--time_shift=true",
        "--time_shift=True",
        "--time_shift=1",
        "--time-shift=yes",
    ],
)
def test_client_switch_is_on(token):
    assert parse_client_arguments([token], backend="asyncdiff").time_shift is True


@pytest.mark.parametrize("token", ["--time_shift=false", "--time_shift=0", "--time_shift=None"])
def test_client_switch_is_off(token):
    assert parse_client_arguments([token], backend="asyncdiff").time_shift is False


def test_client_arguments_take_older_names_and_dashes():
    settings = parse_client_arguments(
        ["--model=/m", "--warm-up-steps=3", "--synced_steps=5", "--compile_encoder"],
        backend="asyncdiff",
    )
    assert (settings.checkpoint, settings.warm_up_steps, settings.warmup_steps) == ("/m", 3, 5)
    assert settings.compile_text_encoder is True


def test_client_arguments_take_no_abbreviations(caplog):
    assert parse_client_arguments(["--checkp=/m"], backend="xdit").checkpoint is None
    assert "--checkp is not an argument" in caplog.text


def test_client_control_net_as_bare_path_means_scale_one():
    assert parse_client_arguments(["--control_net=/c/net"], backend="asyncdiff").control_net == {
        "/c/net": 1.0
    }


def test_client_path_as_json_string_loses_its_quotes():
    settings = parse_client_arguments(
        ['--motion_adapter_lora="/p/x.safetensors"'], backend="asyncdiff"
    )
    assert settings.motion_adapter_lora == {"/p/x.safetensors": 1.0}


@pytest.mark.parametrize(
    "token",
    ["--variant=fp8", "--height=513", "--lora={broken", "--stride=3", "--time_shift=perhaps"],
)
def test_client_value_that_cannot_be_meant_keeps_the_port_and_the_reason(token):
    settings, problem = settings_or_problem(["--port=6123", "--type=flux", token], backend="xdit")
    assert (settings.port, settings.type, settings.backend) == (6123, "flux", "xdit")
    assert token.partition("=")[0] in str(problem) and "Allowed:" in str(problem)


def test_client_port_is_kept_also_when_written_as_two_words():
    settings, problem = settings_or_problem(["--port", "6123", "--variant=fp8"], backend="xdit")
    assert settings.port == 6123
    assert problem is not None


def test_client_hosts_may_read_images_from_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert parse_client_arguments([], backend="xdit").image_dirs == str(tmp_path)


def test_unknown_argument_names_the_closest():
    with pytest.raises(
        ConfigError,
        match=r"--chekpoint=/m is not an argument of this command\. Did you mean --checkpoint\?",
    ):
        parse_command_line(["--type=sdxl", "--chekpoint=/m"])


def test_abbreviated_argument_is_refused():
    with pytest.raises(ConfigError, match="Did you mean --checkpoint"):
        parse_command_line(["--checkpoin=/m"])


def test_dashes_and_underscores_are_equal_in_names_and_kept_in_values():
    assert parse_command_line(["--warm-up-steps=2", "--vae=/a-b/c_d"]) == Settings(
        warm_up_steps=2, vae="/a-b/c_d"
    )


def test_valued_argument_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--port.*expected one argument"):
        parse_command_line(["--port"])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("--port=0", "--port=0 is not allowed. Allowed: a whole number from 1 to 65535."),
        ("--port=six", "--port=six is not allowed. Allowed: a whole number from 1 to 65535."),
        (
            "--height=100",
            "--height=100 is not allowed. Allowed: a whole number from 8 to 8192, a multiple of 8.",
        ),
        (
            "--warm_up_steps=-1",
            "--warm_up_steps=-1 is not allowed. Allowed: a whole number from 0 to 1000.",
        ),
        (
            "--synced_percent=101",
            "--synced_percent=101 is not allowed. Allowed: a number from 0 to 100.",
        ),
        (
            "--synced_percent=some",
            "--synced_percent=some is not allowed. Allowed: a number from 0 to 100.",
        ),
        (
            "--backend=xdti",
            "--backend=xdti is not allowed. Allowed: one of auto, single, asyncdiff, distrifuser, "
            "xdit (did you mean xdit?).",
        ),
        ("--variant=int4", "--variant=int4 is not allowed. Allowed: one of fp16, bf16, fp32."),
        ("--check=perhaps", "--check=perhaps is not allowed. Allowed: true or false."),
        ("--lora={broken", "Allowed: valid JSON"),
        ("--lora=[1]", 'Allowed: JSON such as {"path/to/file.safetensors": 0.8}.'),
        ('--lora={"/a": "x"}', 'Allowed: JSON such as {"path/to/file.safetensors": 0.8}.'),
        ("--scheduler=[1]", "Allowed: a name such as euler, or JSON such as"),
        ("--compile_options=text", 'Allowed: JSON such as {"triton.cudagraphs": true}.'),
        (
            "--patch_weights=1,-1",
            "Allowed: positive numbers with commas between them, such as 1,1,0.6.",
        ),
        (
            "--patch_weights=a",
            "Allowed: positive numbers with commas between them, such as 1,1,0.6.",
        ),
        (
            "--attn_layer_num_for_pp=2.5,1",
            "Allowed: whole numbers from 1 with commas between them, such as 10,9.",
        ),
        (
            "--attn_layer_num_for_pp=2,0",
            "Allowed: whole numbers from 1 with commas between them, such as 10,9.",
        ),
    ],
)
def test_value_is_refused_with_what_is_allowed(token, message):
    with pytest.raises(ConfigError) as caught:
        parse_command_line([token])
    assert message in str(caught.value)
    assert token.partition("=")[0] in str(caught.value)


def test_config_file_gives_what_the_command_line_does_not(tmp_path):
    file = tmp_path / "host.yaml"
    file.write_text(
        "type: sdxl\nport: 6005\nwarm-up-steps: 4\ntime_shift: true\nscheduler: {scheduler: "
        "euler}\nlora: {/a: 0.5}\n"
    )
    settings = parse_command_line([f"--config={file}", "--port=6006"])
    assert settings == Settings(
        type="sdxl",
        port=6006,
        warm_up_steps=4,
        time_shift=True,
        scheduler={"scheduler": "euler"},
        lora={"/a": 0.5},
        config=str(file),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("porrt: 1\n", "has an unknown name 'porrt'. Did you mean --port?"),
        ("- a\n", "must hold lines of 'name: value', not a list"),
        ("a: [\n", "is not YAML"),
        ("port: many\n", "--port=many is not allowed"),
    ],
)
def test_wrong_config_file_is_refused(text, message, tmp_path):
    file = tmp_path / "host.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_command_line([f"--config={file}"])
    assert message in str(caught.value)


def test_missing_config_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        parse_command_line([f"--config={tmp_path / 'none.yaml'}"])


def test_every_spelling_belongs_to_one_option():
    spellings = [
        spelling for option in options().values() for spelling in (option.name, *option.aliases)
    ]
    assert len(spellings) == len(set(spellings)) == len(canonical_names())


def test_page_of_arguments_has_a_row_for_every_option():
    page = arguments_page()
    assert page.count("\n| `--") == len(options())
    assert all(f"`--{spelling}`" in page for spelling in canonical_names())
    assert all(f"## {title}\n" in page for title in SECTIONS.values())


def test_ten_arguments_come_first():
    assert {name for name, option in options().items() if option.section == "common"} == {
        "type", "checkpoint", "port", "host", "nproc_per_node", "backend", "quality", "api_key",
        "lora_dir", "state_dir",
    }  # fmt: skip


def test_every_option_is_read_somewhere():
    """An argument that nothing reads must not exist."""
    root = Path(settings_module.__file__).parents[2]
    files = [
        root / "launcher.py",
        *(root / "hosts").rglob("*.py"),
        *(root / "backends").rglob("*.py"),
    ]
    source = "\n".join(file.read_text() for file in files if file.name != "settings.py")
    assert [name for name in options() if name not in source] == []


def test_steps_before_and_at_the_start_of_an_image_are_two_arguments():
    start = plan(backend="distrifuser", num_ranks=2, prewarm_steps=2, warmup_steps=6)
    assert (start.load.prewarm_steps, start.plan.options["warmup_steps"]) == (2, 6)


@pytest.mark.parametrize("parse", [parse_command_line, parse_for_asyncdiff])
@pytest.mark.parametrize("spelling", ["warmup_steps", "warm_up", "synced_steps", "synced-steps"])
def test_older_spellings_of_warmup_steps(spelling, parse):
    """Synchronous steps at the start of each image, and no throw-away image."""
    settings = parse([f"--{spelling}=5"])
    start = plan(**settings.given | {"backend": "asyncdiff", "type": "sdxl"}, num_ranks=2)
    is_new = spelling == "warmup_steps" and parse is not parse_command_line
    assert start.plan.options["warmup_steps"] == (3 if is_new else 5)


@pytest.mark.parametrize("backend", ["distrifuser", "asyncdiff", None])
def test_warm_up_steps_prewarm_and_are_synchronous_steps_of_distrifuser(backend):
    """Its first meaning is for all backends, the second for distrifuser, named or chosen."""
    settings = parse_command_line(["--warm_up_steps=7"])
    values = {**settings.given, "mode": "throughput", "backend": backend}
    start = plan(**{name: value for name, value in values.items() if value}, num_ranks=2)
    assert start.load.prewarm_steps == 7
    is_distrifuser = start.plan.method == "distrifuser"
    assert is_distrifuser is (backend != "asyncdiff")
    assert start.plan.options["warmup_steps"] == (7 if is_distrifuser else 3)


def test_newer_names_win_over_warm_up_steps():
    start = plan(
        backend="distrifuser", num_ranks=2, warm_up_steps=7, prewarm_steps=1, warmup_steps=2
    )
    assert (start.load.prewarm_steps, start.plan.options["warmup_steps"]) == (1, 2)


def test_warmup_steps_of_pipefusion_and_where_there_are_none(tmp_path):
    sd3 = {"type": "sd3", "checkpoint": str(checkpoint("sd3")), "backend": "xdit"}
    start = plan(**sd3, num_ranks=2, pipefusion_parallel_degree=2, warmup_steps=2)
    assert start.plan.options["warmup_steps"] == 2
    idle = "--warmup_steps has no effect: this plan uses no values of the previous step"
    assert idle not in start.reasons
    assert idle in plan(**sd3, num_ranks=2, ulysses_degree=2, warmup_steps=2).reasons
    assert idle in plan(warmup_steps=2).reasons


@pytest.mark.parametrize("value", ["10,9", "10 9", "[10, 9]"])
def test_blocks_of_each_stage_are_whole_numbers_however_they_are_written(value):
    assert parse_command_line([f"--attn_layer_num_for_pp={value}"]).attn_layer_num_for_pp == (10, 9)
    assert Settings.from_values({"attn_layer_num_for_pp": [10, 9]}).attn_layer_num_for_pp == (10, 9)


def test_weights_are_a_list_in_a_config_file(tmp_path):
    file = tmp_path / "host.yaml"
    file.write_text("type: sdxl\nsegment_weights: [1, 0.6]\npatch_weights: 1,0.6\n")
    settings = parse_command_line([f"--config={file}"])
    assert settings.segment_weights == settings.patch_weights == (1.0, 0.6)


def test_key_is_read_from_a_file_and_never_shown(tmp_path):
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\nsecond line\n")
    settings = Settings.from_values({"api_key": f"@{file}"})
    assert settings.api_key == "0123456789abcdef"
    assert "api_key" not in settings.given


@pytest.mark.parametrize(
    "value", ["short", "@/nowhere", "0123456789 abcdef", "0123456789abcdef\u00e9"]
)
def test_key_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="a key of at least 16 characters"):
        Settings.from_values({"api_key": value})
