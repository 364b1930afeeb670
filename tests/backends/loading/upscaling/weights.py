"""Small upscalers with random weights, under all names by which such weights are published."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from backends.loading.upscaling.rrdb import RRDBNet, Shape

OLD_LAYERS = {
    "conv_first": "model.0",
    "conv_up1": "model.3",
    "conv_up2": "model.6",
    "conv_hr": "model.8",
    "conv_last": "model.10",
}
OLD_NAMES = {
    "conv_body": "trunk_conv",
    "conv_up1": "upconv1",
    "conv_up2": "upconv2",
    "conv_hr": "HRconv",
}


def network(fold: int = 1) -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(Shape(num_blocks=2, channels=8, growth=4, fold=fold)).eval()


def as_layers(weights):
    """Names of the first models, as a list of layers."""
    found = {}
    for name, tensor in weights.items():
        name = re.sub(r"^body\.(\d+)\.rdb(\d)\.conv(\d)\.", r"model.1.sub.\1.RDB\2.conv\3.0.", name)
        name = re.sub(r"^conv_body\.", "model.1.sub.2.", name)
        layer, _, rest = name.partition(".")
        found[f"{OLD_LAYERS.get(layer, layer)}.{rest}"] = tensor
    return found


def as_old_names(weights):
    found = {}
    for name, tensor in weights.items():
        name = re.sub(r"^body\.(\d+)\.rdb(\d)\.", r"RRDB_trunk.\1.RDB\2.", name)
        layer, _, rest = name.partition(".")
        found[f"{OLD_NAMES.get(layer, layer)}.{rest}"] = tensor
    return found


FORMS = {
    "today.pth": lambda weights: {"params_ema": weights},
    "layers.pth": as_layers,
    "names.pth": as_old_names,
    "today.safetensors": lambda weights: weights,
}


def saved(folder: Path, form: str = "today.safetensors", fold: int = 1) -> Path:
    path, weights = folder / form, FORMS[form](dict(network(fold).state_dict()))
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path
