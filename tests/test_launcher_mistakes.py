"""A wrong command line is one line and exit code 2, before anything starts: every option with bad
values, and mistakes that need a file.
"""

import json
import shutil

import pytest

import launcher
from hosts.launch.settings import options
from tests.checkpoints import checkpoint, lora

UNET = launcher.SCRIPT.parent / "demo/checkpoint/unet/diffusion_pytorch_model.safetensors"
DEEP = "[" * 5000
BAD = (
    "",
    "\0",
    "x" * 5000,
    "9" * 5000,
    DEEP,
    '{"a":' * 5000,
    '{"a": 1' + "0" * 400 + "}",
    "~nosuchuser/x",
    "/proc/self/mem",
)
BASE = ("--nproc_per_node=1", "--check")


def run(capsys, *arguments):
    code = launcher.main([*BASE, *arguments])
    told = capsys.readouterr()
    return code, told.err


def assert_is_a_mistake(code, error):
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert len(error) < 1500


@pytest.mark.parametrize("section", sorted({option.section for option in options().values()}))
def test_bad_value_of_any_option_is_accepted_or_refused_in_one_line(section, capsys):
    given = ("--type=sdxl", f"--checkpoint={checkpoint('sdxl')}")
    refused = 0
    for name, option in options().items():
        if option.section != section:
            continue
        for value in BAD:
            others = [each for each in given if not each.startswith(f"--{name}=")]
            code, error = run(capsys, *others, f"--{name}={value}")
            if code != 0:
                assert_is_a_mistake(code, error)
                refused += 1
    assert refused > 0


CONFIGS = {
    "not UTF-8": b"type: \xff",
    "a date": b"type: sdxl\nheight: 2020-01-01\n",
    "bytes": b"type: sdxl\nvae: !!binary aGVsbG8=\n",
    "a set": b"type: sdxl\nlora: !!set {a, b}\n",
    "a circle": b"type: sdxl\nlora: &a [*a]\n",
    "400 levels": b"type: sdxl\nlora: " + b"[" * 400 + b"]" * 400,
    "a list": b"- type\n",
    "an unknown name": b"typo: sdxl\n",
    "a value that is not allowed": b"type: sdxl\nport: 0\n",
    "a NUL": b"type: sdxl\nvae: \0\n",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_wrong_config_file_is_refused_in_one_line(content, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    assert_is_a_mistake(*run(capsys, f"--config={file}"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--host=203.0.113.9", "--api_key=0123456789abcdef"), "not an address of this machine"),
        (("--host=not_a_host", "--api_key=0123456789abcdef"), "not an address of this machine"),
        (("--lora_dir=/nowhere",), "folders that exist"),
        (("--image_dirs=/tmp:/nowhere",), "/nowhere is not one"),
        (("--state_dir=",), "leave the argument out"),
        (("--state_dir=/dev/null",), "a folder, or a path where one can be created"),
        (('--lora={"a": 1e400}',), "--lora"),
        (("--unet=/etc/passwd",), "is not a file of weights"),
        (("--checkpoint=~nosuchuser/x",), "Could not determine home directory"),
        (("--compile_unet", "--compile_mode=fast"), "max-autotune"),
        (("--compile_unet", "--compile_backend=inducto"), "did you mean inductor?"),
        (
            ("--compile_unet", '--compile_options={"max_autotun": true}'),
            "max_autotun is not one (closest: max_autotune",
        ),
        (("--engine=ray", '--deployments={"../../x": {}}'), "cannot be a model's name"),
    ],
)
def test_mistake_is_found_by_check(arguments, said, capsys):
    code, error = run(capsys, "--type=sdxl", *arguments)
    assert_is_a_mistake(code, error)
    assert said in error


@pytest.mark.parametrize(
    ("type_name", "other"), [("sdxl", "flux"), ("flux", "sdxl"), ("sd1", "wan_t2v")]
)
def test_lora_of_another_kind_of_denoiser_is_refused_by_check(type_name, other, capsys):
    given = (f"--type={type_name}", f"--checkpoint={checkpoint(type_name)}")
    code, error = run(capsys, *given, f"--lora={lora(other)}")
    assert_is_a_mistake(code, error)
    assert f"but --type={type_name} has a " in error
    assert run(capsys, *given, f"--lora={lora(type_name)}")[0] == 0


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_lora_given_as_checkpoint_is_told_apart_before_anything_else_is_looked_for(style, capsys):
    file = lora("sdxl") if style == "diffusers" else lora("sdxl", style=style)
    code, error = run(capsys, "--type=sdxl", f"--checkpoint={file}")
    assert_is_a_mistake(code, error)
    assert "is a LoRA. Give it with --lora" in error


def scheduler(**settings):
    return f"--scheduler={json.dumps(settings)}"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_timesteps": "x"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**10},
        {"beta_start": "0.1"},
        {"beta_start": float("nan")},
        {"beta_end": 2},
        {"beta_schedule": "square"},
        {"trained_betas": [0.1, "x"]},
        {"prediction_type": "v"},
        {"clip_sample": "no"},
        {"shift": {}},
        {"steps_offset": "1"},
        {"solver_order": 99},
        {"scheduler": "dpmpp_2m", "algorithm_type": "dpm"},
        {"scheduler": "dpmpp_2m", "algorithm_type": "deis"},
        {"scheduler": "deis", "algorithm_type": "sde-dpmsolver++"},
    ],
    ids=str,
)
def test_scheduler_settings_that_loading_would_refuse_are_refused_by_check(settings, capsys):
    code, error = run(capsys, "--type=sdxl", scheduler(**settings))
    assert_is_a_mistake(code, error)
    assert list(settings)[-1] in error


def test_scheduler_settings_of_the_model_are_allowed_at_launch(capsys):
    given = {"num_train_timesteps": 500, "beta_start": 0.001, "prediction_type": "v_prediction"}
    assert run(capsys, "--type=sdxl", scheduler(scheduler="ddim", **given))[0] == 0


@pytest.fixture
def vae(tmp_path):
    """The folder of a VAE, to be changed."""
    return shutil.copytree(checkpoint("sdxl") / "vae", tmp_path / "vae")


def test_vae_needs_a_configuration_with_something_in_it(vae, tmp_path, capsys):
    weights, config, empty = next(vae.glob("*.safetensors")), vae / "config.json", tmp_path / "none"
    empty.mkdir()
    for given in (
        (f"--vae={empty}",),
        (f"--vae={weights}", f"--vae_config={empty}"),
        (f"--vae={weights}", f"--vae_config={weights}"),
    ):
        assert_is_a_mistake(*run(capsys, "--type=sdxl", *given))
    config.write_text("{}")
    for given in ((f"--vae={vae}",), (f"--vae={weights}", f"--vae_config={config}")):
        code, error = run(capsys, "--type=sdxl", *given)
        assert_is_a_mistake(code, error)
        assert "has no configuration" in error


def test_vae_file_beside_a_checkpoint_without_a_vae_needs_a_configuration(vae, tmp_path, capsys):
    folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "whole")
    shutil.rmtree(folder / "vae")
    given = ("--type=sdxl", f"--checkpoint={folder}", f"--vae={next(vae.glob('*.safetensors'))}")
    code, error = run(capsys, *given)
    assert_is_a_mistake(code, error)
    assert "--vae_config=CONFIG.JSON" in error
    assert run(capsys, *given, f"--vae_config={vae / 'config.json'}")[0] == 0


@pytest.mark.parametrize("option", ["vae", "unet"])
def test_folder_without_weights_is_no_component(option, tmp_path, capsys):
    shutil.copy(checkpoint("sdxl") / option / "config.json", tmp_path)
    code, error = run(
        capsys, "--type=sdxl", f"--checkpoint={checkpoint('sdxl')}", f"--{option}={tmp_path}"
    )
    assert_is_a_mistake(code, error)
    assert "holds no weights" in error


def test_damaged_numbers_of_a_denoiser_are_refused_by_check(tmp_path, capsys):
    folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "whole")
    config = folder / "unet" / "config.json"
    sound = json.loads(config.read_text())
    wrong = ("four", [], {}, -1.5, None, True, "9" * 5000, [["a"]])
    refused = 0
    for name in ("in_channels", "block_out_channels", "attention_head_dim", "cross_attention_dim"):
        for value in wrong:
            config.write_text(json.dumps({**sound, name: value}))
            code, error = run(capsys, "--type=sdxl", f"--checkpoint={folder}")
            if code:
                assert_is_a_mistake(code, error)
                refused += 1
    assert refused > 10


def test_file_that_enlarges_nothing_is_no_upscaler(vae, capsys):
    for file in (next(vae.glob("*.safetensors")), lora("sdxl")):
        code, error = run(capsys, "--type=sdxl", f"--upscalers={file}")
        assert_is_a_mistake(code, error)
        assert "network that enlarges images" in error


def test_configuration_of_nothing_is_told(vae, capsys):
    assert launcher.main([*BASE, "--type=sdxl", f"--vae_config={vae / 'config.json'}"]) == 0
    assert "--vae_config has no effect: there is no --vae" in capsys.readouterr().out


def test_checkpoint_with_a_broken_description_is_refused_by_check(tmp_path, capsys):
    for content in ("{", "[]", json.dumps({"_class_name": 5}), DEEP):
        (tmp_path / "model_index.json").write_text(content)
        assert_is_a_mistake(*run(capsys, "--type=sdxl", f"--checkpoint={tmp_path}"))


@pytest.mark.parametrize("component", ["scheduler", "unet", "vae"])
def test_component_that_diffusers_lacks_is_told_by_check(component, tmp_path, capsys):
    """Of a checkpoint that is newer than the installed diffusers."""
    folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "whole")
    index = json.loads((folder / "model_index.json").read_text())
    index[component][1] = "FutureModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    code, error = run(capsys, "--type=sdxl", f"--checkpoint={folder}")
    assert_is_a_mistake(code, error)
    assert f"has a {component} of class FutureModel" in error


@pytest.mark.parametrize("arguments", [[], ["{}"], ["[1]"], ["{"]])
def test_agent_is_for_the_launcher_itself(arguments, capsys):
    assert launcher.main(["agent", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--type=sdxl", "--type=sd1"], "--type was given twice, as sdxl and as sd1. Give it"),
        (["--type=sdxl", "--lora=a", "--lora=b"], "--lora was given twice, as a and as b"),
        (["--type=sdxl", "--prewarm_steps=1", "--prewarm-steps=2"], "--prewarm_steps was given"),
        (["--type=sdxl", "--compel", "--compel=false"], "--compel was given twice, as tr"),
        (["--type=SDLX"], "type='SDLX' is not a model type. Did you mean 'sdxl'?"),
        (["--type=sdxl", "--step_cache=deep,2", "--quality=exact"],
         "--step_cache=deep,2 and --quality=exact were given, but a step cache gives approx"),
        (["--type=sdxl", f"--gguf_model={UNET}"],
         "is not a GGUF file (.gguf). Give it with --unet."),
        (["--type=sdxl", "--features"], "--features was given without --list. Give that too"),
        (["--type=sdxl", "--checkpoint_config=/tmp"], "--checkpoint_config=/tmp was given, but the "
         "demo model is a folder"),
        (["--type=ad"], "Give the folder of an AnimateDiff model"),
    ],
)  # fmt: skip
def test_what_contradicts_or_is_of_another_kind_is_refused(arguments, said, capsys):
    code, error = run(capsys, *arguments)
    assert code == 2 and said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--list", "--type=sdxl"], 2, "--type was given beside --list, which shows all types"),
        (["--list", "--check"], 2, "--check was given beside --list"),
        (["--type=sdxl", "--json"], 2, "--json was given without --list or --check"),
        (["--list", "--features"], 0, ""),
    ],
)
def test_the_list_of_types_reads_no_other_arguments(arguments, code, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert launcher.main(arguments) == code and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("type: sdxl\nheight: 512\nheight: 768\n", "has the name 'height' twice. Leave one of"),
        (
            "type: sdxl\nmodel: /a\ncheckpoint: /b\n",
            "has 'checkpoint' twice, also by its other name",
        ),
    ],
)
def test_a_file_of_arguments_names_each_once(tmp_path, text, said, capsys):
    (tmp_path / "config.yaml").write_text(text)
    code, error = run(capsys, f"--config={tmp_path / 'config.yaml'}")
    assert code == 2 and said in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--compile_fullgraph_off"],
            "--compile_fullgraph_off has no effect: there is no --compile",
        ),
        (["--prewarm_steps=0", "--warm_up_steps=2"], "--warm_up_steps has no effect: --prewarm"),
        (["--compile_unet", "--lora_dir=/tmp"], "--lora_dir has no effect: --compile_unet makes"),
    ],
)
def test_arguments_without_effect_are_told(arguments, said, capsys):
    assert launcher.main(["--check", "--type=sdxl", *arguments]) == 0
    assert said in capsys.readouterr().out
