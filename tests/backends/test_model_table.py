"""The model table's reader: what it says, and the line of what is wrong."""

from pathlib import Path

import pytest

from backends.errors import ConfigError, UnsupportedError
from backends.model_table import FEATURES, TABLE_PATH, read_table

ROW = """
sd1:
  title: Stable Diffusion
  pipeline: StableDiffusionPipeline
  denoiser: unet
  output: image
  returns_latents: true
  latents: spatial
  height: 512
  width: 512
  num_inference_steps: 30
  guidance_scale: 7.5
  backends:
    distrifuser: {status: unsupported, reason: it cannot}
    asyncdiff:
      status: tested
      features: {lora: tested, gguf: {status: unsupported, reason: no loader}}
    single: {status: tested}
"""


def read(text: str, tmp_path: Path):
    path = tmp_path / "model_table.yaml"
    path.write_text(text)
    return read_table(path)


def test_the_types_that_clients_offer_and_the_newer_ones_are_there() -> None:
    offered = {
        "ad",
        "sd1",
        "sd2",
        "sd3",
        "sdup",
        "sdxl",
        "svd",
        "flux",
        "hy",
        "pixa",
        "pixs",
        "zimage",
        "flux2",
        "wan_t2v",
    }
    assert set(read_table()) >= offered


def test_every_cell_of_the_table_has_a_status_and_every_refusal_a_reason() -> None:
    for spec in read_table().values():
        assert "single" in spec.backends
        for row in spec.backends.values():
            for cell in (row.cell, *(row.features[feature] for feature in FEATURES)):
                assert cell.status in ("tested", "untested", "unsupported")
                assert (cell.status == "unsupported") == bool(cell.reason)


def test_absent_features_are_untested_and_reasons_reach_the_user(tmp_path: Path) -> None:
    spec = read(ROW, tmp_path)["sd1"]
    assert spec.supports("asyncdiff", "lora").status == "tested"
    assert spec.supports("asyncdiff", "compile").status == "untested"
    with pytest.raises(
        UnsupportedError,
        match=r"gguf with backend 'asyncdiff' is not available for model type 'sd1': no loader",
    ):
        spec.require("asyncdiff", "gguf")
    with pytest.raises(
        UnsupportedError,
        match=r"backend 'distrifuser' .* it cannot\. Works with: asyncdiff, single",
    ):
        spec.require("distrifuser")
    with pytest.raises(UnsupportedError, match="has no backend 'xdit'"):
        spec.require("xdit")


def test_the_default_backend_is_the_first_that_can_and_single_on_one_rank(tmp_path: Path) -> None:
    spec = read(ROW, tmp_path)["sd1"]
    assert spec.default_backend(2) == "asyncdiff"
    assert spec.default_backend(1) == "single"


def test_an_unknown_type_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"type='sd9' is not a model type. Did you .* Allowed: sd1"
    ):
        read(ROW, tmp_path)["sd9"]


DEFAULTS = """
defaults:
  features: {lora: tested, compile: tested}
  backends:
    asyncdiff: {features: {compile: {status: unsupported, reason: it cannot}}}
"""


def test_defaults_hold_where_a_type_says_nothing_else(tmp_path: Path) -> None:
    table = read(DEFAULTS + ROW.replace("lora: tested, ", ""), tmp_path)
    assert list(table) == ["sd1"]
    spec = table["sd1"]
    assert spec.supports("single", "lora").status == "tested"
    assert spec.supports("single", "compile").status == "tested"
    assert spec.supports("asyncdiff", "compile").reason == "it cannot"
    assert spec.supports("asyncdiff", "gguf").reason == "no loader"
    assert spec.supports("single", "gguf").status == "untested"
    own = ROW.replace("  backends:", "  features: {compile: untested}\n  backends:")
    assert read(DEFAULTS + own, tmp_path)["sd1"].supports("asyncdiff", "compile").reason == ""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("lora: tested", "lara: tested", "line 3: defaults.features.lara is not a feature"),
        ("lora: tested", "lora: maybe", "line 3: defaults.features.lora must say status"),
        ("    asyncdiff", "    asyncdif", "line 5: defaults.backends.asyncdif is not known"),
        ("  features: {lora", "  futures: {lora", "line 3: defaults.futures is not known"),
        (", reason: it cannot", "", "line 5: .*asyncdiff.features.compile is unsupported but"),
    ],
)
def test_wrong_defaults_name_their_line(
    right: str, wrong: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(DEFAULTS.replace(right, wrong) + ROW, tmp_path)


WRONG = [
    (
        "denoiser: unet",
        "denoiser: net",
        "line 5: sd1.denoiser='net' is not allowed. Allowed: unet, transformer",
    ),
    ("height: 512", "height: tall", "line 9: sd1.height must be of type int, not 'tall'"),
    ("height: 512", "hight: 512", "line 9: sd1.hight is not a fact"),
    ("  height: 512\n", "", "line 3: sd1 lacks height"),
    ("status: tested\n", "status: probably\n", "line 16: sd1.backends.asyncdiff must say status"),
    (
        ", reason: no loader",
        "",
        "line 17: sd1.backends.asyncdiff.features.gguf is unsupported but gives no reason",
    ),
    (
        "lora: tested",
        "lara: tested",
        "line 17: sd1.backends.asyncdiff.features.lara is not a feature",
    ),
    ("    asyncdiff:", "    asyncdif:", "line 16: sd1.backends.asyncdif is not a backend"),
    ("  width: 512", "  height: 512", "line 10: 'height' occurs twice"),
    (
        "title: Stable Diffusion",
        "title: [",
        "line 5: ",
    ),  # the rest is the words of the YAML parser that is there
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_a_wrong_table_names_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ROW
    with pytest.raises(ConfigError) as caught:
        read(ROW.replace(old, new), tmp_path)
    assert f"model_table.yaml, {message}" in str(caught.value)


def test_a_missing_table_is_an_error_that_says_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "nothing.yaml")
    assert TABLE_PATH.is_file()


LIKE = """
flux:
  like: sd1
  title: Another
  pipeline: AnotherPipeline
  features: {lora: {status: unsupported, reason: no loader}}
"""
WITHOUT = """
defaults:
  features: {lora: tested, controlnet: tested, inpainting: tested}
  without: {controlnet: "diffusers has none for {title}", inpainting: it cannot}
"""


def test_a_row_takes_what_it_lacks_from_the_row_that_it_is_like(tmp_path: Path) -> None:
    own = "  controlnet: {model: ControlNetModel}\n  compel: {text_encoder: last}\n  backends:"
    table = read(WITHOUT + ROW.replace("  backends:", own) + LIKE, tmp_path)
    first, second = table["sd1"], table["flux"]
    assert (second.title, second.pipeline, second.width) == ("Another", "AnotherPipeline", 512)
    assert second.backends.keys() == first.backends.keys()
    assert first.compel and not second.compel  # of its own class
    assert first.supports("asyncdiff", "controlnet").status == "tested"
    assert second.supports("asyncdiff", "controlnet").reason == "diffusers has none for Another"
    assert second.supports("single", "inpainting").status == "tested"  # it returns latents


def test_a_row_like_one_that_is_not_above_it_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3: flux\.like='sd1' is no row above it"):
        read(LIKE, tmp_path)


def test_videos_in_pieces_have_the_lengths_of_whole_pieces():
    """As Helios' pipeline made them on a tiny checkpoint: 34 frames became 65, in pieces of 3
    latents 20 became 25.
    """
    helios = read_table()["helios"]
    lengths = [length for length in range(1, 300) if length in helios.lengths_around(length)]
    assert lengths == [33, 65, 97, 129, 165, 197, 229, 261, 297]
    assert helios.lengths_around(34) == (33, 65)
    assert helios.lengths_around(20, latent_chunk=3) == (17, 25)
    assert helios.num_frames in lengths
