"""The tiny checkpoints are worth testing with: they load as real ones do, and what goes in matters
for what comes out.
"""

import functools
import tempfile

import numpy
import pytest
import torch

from tests.checkpoints import NAMES, SD35_MEDIUM, checkpoint, inputs, load
from tests.checkpoints.cache import cached

# largest difference of a pixel in [0, 1] that counts as another image; rounding stays below 1e-4
VISIBLE = 0.02
FAST = (
    "sdxl",
    "svd",
    "flux",
)  # a UNet, a video and a transformer; test_pipeline.py draws with all of them
WITH_PROMPT = [name for name in NAMES if name != "svd"]


@pytest.fixture(scope="module")
def pipelines():
    """name -> pipeline, each loaded once, when a test first wants it."""
    return functools.cache(load)


def image_of(pipe, name: str, **changes: object) -> numpy.ndarray:
    result = pipe(**inputs(name, **changes))
    return numpy.asarray(result.images if hasattr(result, "images") else result.frames)


def difference(one: numpy.ndarray, other: numpy.ndarray) -> float:
    return float(numpy.abs(one - other).max())


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_image_has_the_requested_size_and_is_finite_and_not_flat(pipelines, name):
    image = image_of(pipelines(name), name)
    assert image.shape[-3:] == (64, 64, 3)
    assert numpy.isfinite(image).all()
    assert image.std() > VISIBLE


@pytest.mark.parametrize(
    "name",
    [name if name == "sdxl" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_same_seed_gives_the_same_bits_and_another_seed_another_image(pipelines, name):
    image = image_of(pipelines(name), name, seed=1)
    assert numpy.array_equal(image, image_of(pipelines(name), name, seed=1))
    assert difference(image, image_of(pipelines(name), name, seed=2)) > VISIBLE


@pytest.mark.parametrize(
    "name",
    [
        name if name == "sdxl" else pytest.param(name, marks=pytest.mark.slow)
        for name in WITH_PROMPT
    ],
)
def test_another_prompt_gives_another_image(pipelines, name):
    image = image_of(pipelines(name), name, prompt="a red car")
    assert (
        difference(image, image_of(pipelines(name), name, prompt="a blue bird in the snow"))
        > 5 * VISIBLE
    )


def test_another_image_gives_another_video(pipelines):
    arguments = inputs("svd") | {"image": inputs("svd")["image"].rotate(90)}
    video = numpy.asarray(pipelines("svd")(**arguments).frames)
    assert difference(video, image_of(pipelines("svd"), "svd")) > VISIBLE


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("sd3", SD35_MEDIUM),
        ("flux", {"num_layers": 6, "num_attention_heads": 8}),
        ("flux", {"attention_head_dim": 16}),
        ("hy", {"num_layers": 6, "num_attention_heads": 8}),
        ("pixa", {"num_attention_heads": 8}),
        ("sd1", {"block_out_channels": (16, 32, 32, 32)}),
        ("ad", {"block_out_channels": (16, 32, 32, 32)}),
    ],
    ids=str,
)
def test_variant_generates_and_has_the_config_asked_for(name, variant):
    pipe = load(name, **variant)
    denoiser = pipe.transformer if "transformer" in pipe.components else pipe.unet
    assert {field: denoiser.config[field] for field in variant} == {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in variant.items()
    }
    assert numpy.isfinite(image_of(pipe, name)).all()


def test_gain_makes_attention_matter_more():
    plain, scaled = (load("sd1", attention_gain=gain) for gain in (1.0, None))
    prompts = "a red car", "a blue bird in the snow"
    effects = [
        difference(*(image_of(pipe, "sd1", prompt=prompt) for prompt in prompts))
        for pipe in (plain, scaled)
    ]
    assert effects[1] > 2 * effects[0]


def test_asking_again_gives_the_same_folder_and_another_variant_another():
    assert checkpoint("pixa") == checkpoint("pixa")
    assert (
        len(
            {
                checkpoint("pixa"),
                checkpoint("pixa", seed=1),
                checkpoint("pixa", num_layers=2),
                checkpoint("pixs"),
            }
        )
        == 4
    )


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_building_leaves_the_random_state_alone(empty_cache):
    before = torch.get_rng_state()
    checkpoint("pixa", num_layers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_slower_of_two_builders_takes_what_the_faster_one_made(empty_cache):
    def build(folder, *, then=lambda: None):
        (folder / "weights").write_text("made")
        then()

    slow = cached(
        "thing", {}, lambda folder: build(folder, then=lambda: cached("thing", {}, build))
    )
    assert (slow / "weights").read_text() == "made"
    assert list(slow.parent.iterdir()) == [slow]  # no draft is left behind


def test_failed_build_leaves_nothing_behind(empty_cache, tmp_path):
    def build(folder):
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("thing", {}, build)
    assert list(tmp_path.glob("*/*")) == []


def test_rejects_an_unknown_name():
    with pytest.raises(
        ValueError, match=r"No tiny checkpoint named 'sd4'. Allowed: ad, sd1, .*pixs"
    ):
        checkpoint("sd4")
