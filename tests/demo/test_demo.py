"""The demo model: its images, its captions, its judge, and the checkpoint in the repository."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import assemble, data, evaluate, latents, model, train, train_unet, train_vae
from demo.__main__ import num_ranks
from demo.data import Scene, Thing
from demo.judge import judge

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "demo" / "checkpoint"


def red_circle(*, colour: str = "red", shape: str = "circle", x: float = 0.5) -> Scene:
    thing = Thing(shape=shape, colour=colour, x=x, y=0.5, radius=0.24)
    return Scene(
        caption="a red circle on a blue background",
        things=(thing,),
        background="blue",
        kind="single",
    )


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_demo_runs_on_as_many_ranks_as_there_are_gpus(gpus, ranks):
    assert num_ranks(gpus) == ranks


@pytest.fixture(scope="module")
def pipe():
    torch.set_num_threads(1)
    return evaluate.load(CHECKPOINT)


@pytest.mark.parametrize("size", [128, 256])
def test_judge_agrees_with_true_renders(size):
    rng = random.Random(3)
    scenes = [data.training_scene(rng) for _ in range(60)]
    verdicts = [judge(data.render(scene, size, rng), scene) for scene in scenes]
    assert sum(verdict["all"] for verdict in verdicts) >= 0.95 * len(scenes)


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        (red_circle(colour="green"), {"colours", "shape", "count", "position", "all"}),
        (red_circle(shape="cross"), {"shape", "all"}),
        (red_circle(x=0.73), {"position", "all"}),
    ],
)
def test_judge_says_what_is_wrong(drawn, wrong):
    verdict = judge(data.render(drawn, 128, random.Random(0)), red_circle())
    assert {measure for measure, right in verdict.items() if not right} == wrong


def test_judge_counts_a_second_circle():
    one, other = red_circle(x=0.25).things[0], red_circle(x=0.75).things[0]
    drawn = Scene(caption="", things=(one, other), background="blue", kind="count")
    assert not judge(data.render(drawn, 128, random.Random(0)), red_circle(x=0.25))["count"]


def test_shapes_of_one_image_never_touch():
    rng = random.Random(5)
    for scene in (data.any_scene(rng, kind=kind) for kind in ("count", "pair") for _ in range(150)):
        covered = sum(data.coverage(thing, 128) > 0 for thing in scene.things)
        assert covered.max() == 1, scene.caption


def test_evaluation_captions_never_come_from_the_training_sampler():
    keys = {data.caption_key(scene.caption) for scene in data.evaluation_scenes()}
    rng = random.Random(11)
    assert len(keys) == 100
    assert not keys & {data.caption_key(data.training_scene(rng).caption) for _ in range(20_000)}


def test_evaluation_captions_are_of_the_grammar_and_would_be_drawn_without_the_exclusion():
    singles = {
        data.caption_key(scene.caption)
        for scene in data.evaluation_scenes()
        if scene.kind == "single"
    }
    rng = random.Random(11)
    drawn = {data.caption_key(data.any_scene(rng).caption) for _ in range(20_000)}
    assert len(singles & drawn) > len(singles) / 2


def test_both_ways_to_name_the_background_are_held_out_together():
    assert data.caption_key("a red ring on an orange background") == data.caption_key(
        "a red ring, orange background"
    )


def test_linear_latents_keep_the_image():
    sample_images, _ = data.training_images(4, seed=1, size=128)
    pixels = latents.from_uint8(sample_images)
    error = (latents.to_pixels(latents.to_latents(pixels)) - pixels).pow(2).mean()
    assert 10 * torch.log10(4 / error) > 28  # dB


def test_help_of_training_and_evaluation_imports_no_torch():
    for module in ("train", "evaluate"):
        script = (
            f"import sys; import demo.{module} as m; m.make_parser().format_help(); assert "
            "'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work folder and the checkpoint of a training of about a second, all stages, started from
    the repository's checkpoint.
    """
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_unet, "CHUNK", 20)
        patch.setattr(train_vae, "IMAGES", 32)
        patch.setattr(train_vae, "HELD_OUT_IMAGES", 2)
        words = [
            "--minutes",
            "0.01",
            "--thousands",
            "1",
            "--start",
            str(CHECKPOINT),
            "--work",
            str(folder),
            "--out",
            str(folder / "out"),
        ]
        train.main(words)
    return folder


def test_training_stages_end_in_a_checkpoint_that_loads(trained):
    pipe = evaluate.load(trained / "out")
    assert pipe.default_sample_size * pipe.vae_scale_factor == 128
    assert (pipe.tokenizer.model_max_length, pipe.unet.config.attention_head_dim) == (77, [4, 8, 8])
    assert not [
        file for file in (trained / "out").rglob("*.json") if str(trained) in file.read_text()
    ]
    assert evaluate.generate(
        pipe, ["a red circle"], seed=0, height=128, width=128, num_inference_steps=1
    )[0].shape == (128, 128, 3)


def test_training_continues_from_the_saved_state(trained):
    first = torch.load(trained / "unet_state.pt")["step"]
    training = train_unet.UnetTraining(train_unet.Plan(seconds=1, folder=trained, start=CHECKPOINT))
    assert first > 0
    assert training.step == first


def test_assemble_refuses_a_checkpoint_over_the_limit_and_keeps_the_old_one(trained, monkeypatch):
    monkeypatch.setattr(assemble, "SIZE_LIMIT_BYTES", 1_000_000)
    with pytest.raises(
        ValueError, match=r"At most 1000000 are allowed\. Make the model narrower\."
    ):
        assemble.assemble(trained, trained / "out", size=128)
    assert (trained / "out" / "model_index.json").exists()


def test_scratch_tokenizer_has_one_token_for_each_word_of_the_grammar():
    tokenizer = model.train_tokenizer(2000)
    rng = random.Random(1)
    for caption in (data.training_scene(rng).caption for _ in range(50)):
        assert len(tokenizer.tokenize(caption)) == len(caption.replace(",", " ,").split())


def test_narrowing_a_level_keeps_the_start_of_both_halves_of_a_skip_input():
    kept = model._fitted(torch.arange(224.0), torch.Size([192]))
    assert kept.tolist() == [*range(96), *range(112, 208)]


def test_added_text_positions_repeat_the_last_one():
    assert model._fitted(torch.arange(32.0)[:, None], torch.Size([77, 1]))[30:34, 0].tolist() == [
        30,
        31,
        31,
        31,
    ]


def test_checkpoint_is_under_16_megabytes():
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 16_000_000


def test_checkpoint_is_in_sdxl_layout(pipe):
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.attention_head_dim == [4, 8, 8]
    assert (pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings) == (
        77,
        77,
    )


def test_checkpoint_draws_a_red_circle_on_a_blue_background(pipe):
    size = pipe.default_sample_size * pipe.vae_scale_factor
    inputs = {"height": size, "width": size, "num_inference_steps": 20, "guidance_scale": 2.5}
    sample_image = evaluate.generate(pipe, ["a red circle on a blue background"], seed=0, **inputs)[
        0
    ]
    assert sample_image.shape == (size, size, 3)
    assert judge(sample_image, red_circle()) == {
        "colours": True,
        "shape": True,
        "count": True,
        "position": True,
        "all": True,
    }


def test_contact_sheet_places_images_in_reading_order():
    sample_images = [np.full((128, 128, 3), value, np.uint8) for value in range(12)]
    sheet = np.asarray(evaluate.contact_sheet(sample_images))
    pitch = evaluate.SHEET_TILE + 2
    assert sheet.shape == (2 * pitch, 10 * pitch, 3)
    assert sheet[pitch + 5, pitch + 5, 0] == 11
