"""Classes that a checkpoint names and libraries lack; settings with which no scheduler works."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from backends.errors import ConfigError
from backends.files.checkpoint import open_checkpoint
from backends.files.component_classes import require_scheduler_settings, require_torchvision
from backends.model_table import read_table
from tests.checkpoints import checkpoint

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
WRONG = {
    "encoder": (INDEX, {"text_encoder": ["transformers", "NewEncoder"]}, "installed transformers"),
    "vae": (INDEX, {"vae": ["diffusers", "NewVAE"]}, "class NewVAE, which the installed diffusers"),
    "scheduler": (INDEX, {"scheduler": ["diffusers", "UNet2DModel"]}, "UNet2DModel as its"),
    "text": (SCHEDULER, {"beta_start": "0.1"}, "beta_start='0.1', and beta_start must be float"),
    "fraction": (SCHEDULER, {"num_train_timesteps": 10.5}, "num_train_timesteps must be int"),
    "switch": (SCHEDULER, {"beta_end": True}, "beta_end=True, and beta_end must be float"),
    "number": (SCHEDULER, {"use_karras_sigmas": "no"}, "use_karras_sigmas must be bool"),
    "choice": (SCHEDULER, {"prediction_type": "eps"}, "prediction_type='eps', which the installed"),
    "spacing": (SCHEDULER, {"timestep_spacing": "even"}, "timestep_spacing='even', which"),
}


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    def change(file: str, entries: dict[str, Any]) -> Path:
        folder = shutil.copytree(checkpoint("sdxl"), tmp_path / "model", copy_function=_link)
        text = json.loads((folder / file).read_text())
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(text | entries))
        return folder

    return change


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


@pytest.mark.parametrize(("file", "entries", "told"), WRONG.values(), ids=WRONG)
def test_class_or_setting_that_cannot_work_is_refused_by_name(changed, file, entries, told):
    with pytest.raises(ConfigError) as error:
        open_checkpoint(read_table()["sdxl"], str(changed(file, entries)))
    assert told in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="is installed")
def test_a_class_that_computes_with_torchvision_is_refused_before_it_loads():
    for name in ("CosmosTransformer3DModel", "CosmosControlNetModel", "OmniGenPipeline"):
        with pytest.raises(ConfigError, match=f"{name}, which needs torchvision, and that is not"):
            require_torchvision(name, given="--checkpoint=model")
    for name in ("FluxTransformer2DModel", "ConsisIDPipeline"):
        require_torchvision(name, given="--checkpoint=model")


def test_every_scheduler_of_diffusers_may_have_the_settings_that_it_writes():
    classes = [
        value
        for name in dir(diffusers)
        if name.endswith("Scheduler") and isinstance(value := getattr(diffusers, name), type)
    ]
    checked = 0
    for scheduler_class in classes:
        try:
            config = json.loads(scheduler_class().to_json_string())
        except (ImportError, NotImplementedError, AttributeError, TypeError):
            continue  # of Flax, abstract, or with a package that is not installed
        require_scheduler_settings(scheduler_class.__name__, config, given="--checkpoint=it")
        checked += 1
    assert checked > 40
