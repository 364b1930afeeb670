"""--models: which models a folder or a list means, and what is refused. Reads headers only."""

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.launch.catalog import plan_models
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from tests.checkpoints import checkpoint, single_file
from tests.hosts.harness import run_launcher


def models_of(text, **settings):
    given = Settings.from_values({"models": text, "backend": "single", **settings})
    return plan_models(given, lambda own: plan_start(own, read_table(), num_gpus=0, num_ranks=1))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Second").symlink_to(checkpoint("sd1"))
    (tmp_path / "first").symlink_to(checkpoint("sdxl"))
    return tmp_path


def test_a_folder_means_the_models_in_it_by_name_in_alphabetical_order(folder):
    found = models_of(str(folder))
    assert {name: one.start.spec.name for name, one in found.items()} == {
        "first": "sdxl",
        "Second": "sd1",
    }
    assert list(found) == ["first", "Second"]
    assert found["first"].settings.checkpoint == str(folder / "first")
    assert found["first"].settings.models is None


def test_a_single_file_has_its_name_and_the_folder_with_what_it_lacks_is_no_model(tmp_path, caplog):
    (tmp_path / "mine.safetensors").symlink_to(single_file("sdxl"))
    without = shutil.ignore_patterns("diffusion_pytorch_model*")
    shutil.copytree(checkpoint("sdxl"), tmp_path / "mine", ignore=without)
    with caplog.at_level(logging.WARNING):
        assert list(models_of(str(tmp_path))) == ["mine"]
    assert not [message for message in caplog.messages if "left out" in message]


def test_models_of_one_name_are_all_there_and_files_keep_their_ending(tmp_path):
    (tmp_path / "mine").symlink_to(checkpoint("sdxl"))
    (tmp_path / "mine.safetensors").symlink_to(single_file("sdxl"))
    torch.save(load_file(single_file("sdxl")), tmp_path / "mine.ckpt")
    found = models_of(str(tmp_path))
    assert list(found) == ["mine", "mine.ckpt", "mine.safetensors"]
    assert all(Path(one.settings.checkpoint).name == name for name, one in found.items())


def test_what_cannot_be_planned_is_left_out_of_a_folder_with_the_reason(folder, caplog):
    (folder / "notes.safetensors").write_bytes(b"no weights at all")
    (folder / "empty").mkdir()
    (folder / "readme.txt").write_text("no model")
    with caplog.at_level(logging.WARNING):
        assert list(models_of(str(folder))) == ["first", "Second"]
    left_out = [message.partition(" is left out: ") for message in caplog.messages]
    assert [path.rpartition("/")[2] for path, _, _ in left_out] == ["empty", "notes.safetensors"]
    assert "cannot be read" in left_out[1][2]


def test_a_list_keeps_its_order(folder):
    found = models_of(f"{folder / 'Second'},{folder / 'first'}")
    assert list(found) == ["Second", "first"]


def test_one_model_by_name_is_a_list_of_one(folder):
    assert list(models_of(str(folder / "first"))) == ["first"]


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("{}/first,{}/notes.safetensors", {}, "--models, 'notes': --checkpoint=.* cannot be read"),
        ("{}/first,{}/missing", {}, "--models, '.*/missing': --checkpoint=.* does not exist"),
        ("{}/first,{}/other/first", {}, "would both be named 'first'. Rename one of them"),
        ("{}/other", {"checkpoint": "x"}, "--checkpoint was given beside --models"),
        ("{}/other", {"type": "sdxl"}, "--type was given beside --models"),
        ("{}/nothing", {}, "holds no model that can be loaded here"),
        ("{}/other", {"nnodes": "2"}, "--models is for one machine, not for --nnodes=2"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, text, settings, said):
    (folder / "notes.safetensors").write_bytes(b"no weights at all")
    (folder / "other").mkdir()
    (folder / "other" / "first").symlink_to(checkpoint("sdxl"))
    (folder / "nothing").mkdir()
    with pytest.raises(ConfigError, match=said):
        models_of(text.replace("{}", str(folder)), **settings)


def test_memory_for_models_needs_models():
    with pytest.raises(ConfigError, match="--models_memory has no effect without --models"):
        plan_models(Settings.from_values({"models_memory": "3"}), lambda own: None)


def test_check_prints_each_model_and_a_gateway_refuses_the_option(folder):
    done = run_launcher(f"--models={folder}", "--check")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["model"]] == ["first", "Second"]
    refused: subprocess.CompletedProcess[str] = run_launcher(
        f"--models={folder}", "--engine=ray", "--check"
    )
    assert refused.returncode == 2
    assert "--models is for one host" in refused.stderr
