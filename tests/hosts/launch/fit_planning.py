"""Plans of launches whose files fit or do not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start
from tests.altered import changed
from tests.checkpoints import (
    checkpoint,
)

TABLE = read_table()
SAME_PARTS = {"sd1", "sd2", "ad"}
"""Types that run each other's checkpoints: one UNet in three pipelines."""


def plan(type_name: str | None, folder: Path | None = None, **options: object) -> StartPlan:
    values = {"type": type_name, "checkpoint": str(folder or checkpoint(type_name)), **options}
    return plan_start(Settings.from_values(values), TABLE, num_gpus=0, num_ranks=1)


def refusal(type_name: str | None, folder: Path | None = None, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(type_name, folder, **options)
    return str(caught.value)


def without(source: Path, folder: Path, component: str) -> Path:
    changed(source, folder, **{component: [None, None]})
    return folder


def weights(path: Path, tensors: dict[str, object], metadata: dict[str, str] | None = None) -> str:
    """A file of zeros: name -> shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: torch.zeros(shape) for name, shape in tensors.items()}, path, metadata=metadata
    )
    return str(path)


def shares_a_unet(one: str, other: str) -> bool:
    return {one, other} <= SAME_PARTS


def beside(file: Path, folder: Path, name: str) -> Path:
    """A single file with the configuration of its folder beside it."""
    target = folder / "model.safetensors"
    target.symlink_to(file)
    ignored = ("*.safetensors",) if TABLE[name].denoiser == "unet" else ()
    shutil.copytree(checkpoint(name), folder / "model", ignore=shutil.ignore_patterns(*ignored))
    return target
