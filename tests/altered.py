"""Tiny checkpoints with one thing changed, for tests of what does not fit. All other files are
links to the originals.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def linked(source: Path, folder: Path) -> Path:
    """Make `folder` a copy of `source` by links, and return it."""
    return shutil.copytree(source, folder, copy_function=lambda old, new: Path(new).symlink_to(old))


def changed(
    source: Path, folder: Path, file: str = "model_index.json", /, **fields: object
) -> Path:
    """Make `folder` a copy of `source` with other fields in one of its JSON files, and return
    it.
    """
    path = linked(source, folder) / file
    content = json.loads(path.read_text()) | fields
    path.unlink()
    path.write_text(json.dumps(content))
    return folder


def without_a_weight(
    source: Path, folder: Path, file: str = f"unet/{WEIGHTS}", *, unknown: tuple[str, ...] = ()
) -> Path:
    """Make `folder` a copy of `source` whose weight file lacks its last tensor and holds `unknown`
    ones, and return it.
    """
    path = linked(source, folder) / file
    weights = load_file(path)
    path.unlink()
    kept = {name: tensor for name, tensor in weights.items() if name != max(weights)}
    save_file(kept | {name: torch.zeros(1) for name in unknown}, path, metadata={"format": "pt"})
    return folder
