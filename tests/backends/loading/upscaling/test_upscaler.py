"""Upscalers: all published names of the weights, tiles without seams, and what is refused."""

import numpy as np
import pytest
import torch

from backends.errors import ConfigError, RequestError
from backends.files.recognition import upscaler_scale
from backends.files.weight_headers import read_header
from backends.loading.upscaling import upscaler
from backends.loading.upscaling.rrdb import Shape, shape_of
from backends.loading.upscaling.upscaler import Upscaler
from tests.backends.loading.upscaling.weights import FORMS, network, saved

CPU = torch.device("cpu")


def load(path):
    return Upscaler(str(path), device=CPU, dtype=torch.float32)


def scale_by_header(path):
    return upscaler_scale(read_header(path, option="--upscalers"))


def image(height, width):
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


@torch.no_grad()
def directly(frames, fold=1):
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    large = network(fold)(pixels).clamp(0, 1)
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_under_every_published_name(form, tmp_path):
    found = load(saved(tmp_path, form))
    assert found.scale == scale_by_header(tmp_path / form) == 4
    assert (found.enlarge(image(12, 16)) == directly(image(12, 16))).all()


@pytest.mark.parametrize(("fold", "scale"), [(1, 4), (2, 2), (4, 1)])
def test_factor_is_read_from_the_weights(fold, scale, tmp_path):
    found = load(saved(tmp_path, fold=fold))
    assert scale_by_header(tmp_path / "today.safetensors") == scale
    assert (found.enlarge(image(16, 24)) == directly(image(16, 24), fold)).all()
    assert found.enlarge(image(13, 15)).shape == (1, 13 * scale, 15 * scale, 3)


def test_published_shapes_are_recognised():
    for blocks, fold in ((23, 1), (6, 1), (23, 2)):
        shape = Shape(num_blocks=blocks, channels=64, growth=32, fold=fold)
        weights = {
            "conv_first.weight": torch.empty(64, 3 * fold**2, 3, 3, device="meta"),
            **{
                f"body.{index}.rdb1.conv1.weight": torch.empty(32, 64, 3, 3, device="meta")
                for index in range(blocks)
            },
        }
        assert shape_of(weights) == shape


def test_tiles_give_the_image_of_the_whole(tmp_path, monkeypatch):
    found, frames = load(saved(tmp_path)), image(70, 50)
    whole = found.enlarge(frames).astype(int)
    monkeypatch.setattr(upscaler, "TILE", 24)
    tiled = found.enlarge(frames).astype(int)
    assert tiled.shape == (1, 280, 200, 3)
    assert np.abs(tiled - whole).max() <= 1
    monkeypatch.setattr(upscaler, "OVERLAP", 0)
    assert np.abs(found.enlarge(frames).astype(int) - whole).max() > 1, "seams would not be seen"


def test_result_has_a_limit(tmp_path):
    found = load(saved(tmp_path))
    found.require_room(2000, 2000)
    with pytest.raises(RequestError, match="would become one of 16000x16000"):
        found.require_room(4000, 4000)


def test_other_files_are_refused(tmp_path):
    torch.save({"params": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    weights = dict(network().state_dict())
    weights.pop("conv_hr.weight")
    torch.save(weights, tmp_path / "part.pth")
    for name, said in {
        "other.pth": "is no upscaler of ESRGAN's kind",
        "list.pth": "holds no weights",
        "broken.safetensors": "cannot be read",
        "part.pth": "does not fit ESRGAN's network",
    }.items():
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name)
