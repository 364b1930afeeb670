"""Steps, guidance, sampler, size and speed that follow from the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from backends.model_table import read_table
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start
from tests.altered import changed, linked
from tests.checkpoints import checkpoint, motion_adapter, single_file
from tests.hosts.harness import run_launcher

TABLE = read_table()


def plan(**options: object) -> StartPlan:
    values = {name: str(value) for name, value in options.items()}
    return plan_start(Settings.from_values(values), TABLE, num_gpus=0, num_ranks=2)


def defaults(start: StartPlan) -> tuple[int, float, str]:
    facts = start.facts()
    return facts["num_inference_steps"], facts["guidance_scale"], facts["scheduler"]


def test_an_ordinary_checkpoint_has_the_defaults_of_its_type():
    assert defaults(plan(checkpoint=checkpoint("sdxl"))) == (30, 5.0, "the checkpoint's")
    facts = plan(checkpoint=checkpoint("svd")).facts()
    assert (facts["num_frames"], facts["fps"]) == (25, 7)
    assert plan(checkpoint=checkpoint("wan_t2v")).facts()["fps"] == 16
    assert plan(checkpoint=checkpoint("flux")).facts()["max_prompt_tokens"] == 512


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("juggernautXL_v9Rdphoto2Lightning", (4, 1.0, "euler")),
        ("sdxl_lightning_8step_unet", (8, 1.0, "euler")),
        ("DreamShaperXL_Turbo_v2_1", (8, 2.0, "euler_a")),
        ("sd_xl_turbo_1.0_fp16", (1, 0.0, "euler_a")),
        ("animagine-lcm", (4, 1.0, "lcm")),
        ("oil_lamps", (30, 5.0, "the checkpoint's")),
    ],
)
def test_a_few_step_file_is_known_by_its_name(name, wanted, tmp_path):
    file = tmp_path / f"{name}.safetensors"
    file.symlink_to(single_file("sdxl"))
    start = plan(checkpoint=file, checkpoint_config=checkpoint("sdxl"))
    assert defaults(start) == wanted
    told = [reason for reason in start.facts()["reasons"] if "the checkpoint is" in reason]
    assert len(told) == (2 if wanted[0] != 30 else 1)


def test_without_guidance_the_ranks_do_not_split_it(tmp_path):
    """The plan is made for the images that will be asked for."""
    folder = linked(checkpoint("sd3"), tmp_path / "stable-diffusion-3.5-large-turbo")
    start = plan(checkpoint=folder, backend="xdit")
    assert defaults(start)[:2] == (4, 0.0) and "cfg" not in start.facts()["axes"]
    assert plan(checkpoint=checkpoint("sd3"), backend="xdit").facts()["axes"]["cfg"] == 2


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("HiDream-I1-Full", (50, 5.0)), ("HiDream-I1-Dev", (28, 0.0)), ("hidream_i1_fast", (16, 0.0))],
)
def test_a_distilled_folder_is_known_by_its_name(name, wanted, tmp_path):
    assert defaults(plan(checkpoint=linked(checkpoint("hidream"), tmp_path / name)))[:2] == wanted


def test_a_checkpoint_is_known_by_its_configuration(tmp_path):
    folder = changed(
        checkpoint("flux"), tmp_path / "any", "transformer/config.json", guidance_embeds=False
    )
    start = plan(checkpoint=folder)
    assert defaults(start)[:2] == (4, 0.0)
    assert start.spec.call["max_sequence_length"] == 256
    folder = changed(
        checkpoint("zimage"), tmp_path / "z", "scheduler/scheduler_config.json", shift=6.0
    )
    assert defaults(plan(checkpoint=folder))[:2] == (50, 4.0)
    assert defaults(plan(checkpoint=checkpoint("zimage")))[:2] == (9, 0.0)


def test_a_folder_keeps_the_sampler_of_its_configuration(tmp_path):
    folder = linked(checkpoint("sdxl"), tmp_path / "sdxl-turbo")
    start = plan(checkpoint=folder)
    assert defaults(start) == (1, 0.0, "the checkpoint's")
    assert (start.facts()["height"], start.facts()["width"]) == (512, 512)
    assert defaults(plan(checkpoint=folder, scheduler="ddim"))[2] == "ddim"


def test_a_few_step_motion_adapter_brings_its_sampler(tmp_path):
    folder = shutil.copytree(motion_adapter(), tmp_path / "animatediff_lightning_4step")
    start = plan(type="ad", checkpoint=checkpoint("sd1"), motion_adapter=folder)
    assert defaults(start) == (4, 1.0, "euler") and start.facts()["fps"] == 8


def test_a_name_on_a_hub_tells_it_too(hub):
    hub.add("stabilityai/sdxl-turbo", checkpoint("sdxl"))
    assert defaults(plan(checkpoint="stabilityai/sdxl-turbo"))[:2] == (1, 0.0)
    hub.add("lightning-lab/ordinary", checkpoint("sdxl"))
    assert defaults(plan(checkpoint="lightning-lab/ordinary"))[:2] == (30, 5.0)


def test_check_shows_them(tmp_path):
    folder = linked(checkpoint("sdxl"), tmp_path / "sdxl-turbo")
    facts = json.loads(run_launcher(f"--checkpoint={folder}", "--check", "--json").stdout)
    assert (facts["num_inference_steps"], facts["max_prompt_tokens"]) == (1, 77)
    assert any("the checkpoint is SDXL Turbo" in reason for reason in facts["reasons"])
    assert Path(facts["checkpoint"]) == folder


def test_a_mask_has_as_many_channels_as_a_token_of_the_vae_has_pixels(tmp_path):
    folder = changed(
        checkpoint("flux_fill"), tmp_path / "a", "vae/config.json", block_out_channels=[8]
    )
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**config, "in_channels": config["in_channels"] - 256 + 4}))
    assert plan(checkpoint=folder).spec.name == "flux_fill"


@pytest.mark.parametrize(
    ("name", "levels", "sizes"),
    [
        ("flux", {"block_out_channels": [8]}, (128, 128, 2)),
        ("sdxl", {"block_out_channels": [8] * 3}, (512, 512, 4)),
        ("qwenimage", {"temperal_downsample": [True] * 4}, (2048, 2048, 32)),
        ("zimage", {}, (1024, 1024, 16)),
    ],
)
def test_sizes_follow_from_how_the_checkpoints_vae_scales(name, levels, sizes, tmp_path):
    folder = changed(checkpoint(name), tmp_path / "any", "vae/config.json", **levels)
    spec = plan(checkpoint=folder).spec
    assert (spec.height, spec.width, spec.size_multiple) == sizes


@pytest.mark.parametrize(
    ("halvings", "patch", "sizes"),
    [(3, 4, (512, 768, 121)), (1, 1, (32, 64, 31)), (2, 1, (64, 96, 61))],
)
def test_sizes_of_ltx2_follow_from_its_vae_in_steps_of_32(halvings, patch, sizes, tmp_path):
    scales = {
        "spatio_temporal_scaling": [True] * halvings,
        "spatial_compression_ratio": None,
        "temporal_compression_ratio": None,
    }
    vae = {**scales, "patch_size": patch, "patch_size_t": 1}
    folder = changed(checkpoint("ltx2"), tmp_path / "any", "vae/config.json", **vae)
    spec = plan(checkpoint=folder).spec
    assert (spec.height, spec.width, spec.num_frames) == sizes


def test_a_folder_that_is_unlike_its_row_runs_as_diffusers_has_it(tmp_path):
    absent = {"text_encoder": [None, None], "tokenizer": [None, None]}
    start = plan(checkpoint=changed(checkpoint("sdxl"), tmp_path / "sdxl", **absent))
    assert start.spec.is_generic
    assert any("does without text_encoder and tokenizer" in each for each in start.reasons)
    file = "transformer/config.json"
    width = json.loads((checkpoint("flux2") / file).read_text())["joint_attention_dim"] // 3
    folder = changed(checkpoint("flux2"), tmp_path / "flux2", file, joint_attention_dim=width)
    start = plan(checkpoint=folder)
    assert start.spec.is_generic
    assert any("reads 1 layers of the encoder, not 3" in each for each in start.reasons)
    assert not plan(checkpoint=checkpoint("flux2")).spec.is_generic
    plain = {"encoder_hid_dim": None, "encoder_hid_dim_type": None}
    folder = changed(checkpoint("kolors"), tmp_path / "kolors", "unet/config.json", **plain)
    start = plan(checkpoint=folder)
    assert start.spec.is_generic
    assert any("its unet has no encoder_hid_dim_type" in each for each in start.reasons)


@pytest.mark.parametrize(
    ("name", "config", "wanted"),
    [
        ("sd3", {}, {"height": (1, 512), "width": (1, 512), "clip_skip": (0, 3)}),
        ("sd1", {}, {"clip_skip": (0, 3)}),
        ("flux", {}, {}),
        ("ad", {}, {"clip_skip": (0, 3), "num_frames": (1, 32)}),
        ("kandinsky5", {}, {"height": (1, 2048), "width": (1, 2048), "num_frames": (1, 509)}),
        (
            "cogvideox_i2v",
            {
                "use_learned_positional_embeddings": True,
                "use_rotary_positional_embeddings": True,
                "sample_height": 8,
                "sample_width": 12,
            },
            {"height": (64, 64), "width": (96, 96)},
        ),
    ],
)
def test_a_checkpoint_says_for_which_sizes_it_has_positions(name, config, wanted, tmp_path):
    file = f"{TABLE[name].denoiser}/config.json"
    folder = changed(checkpoint(name), tmp_path / name, file, **config)
    assert dict(plan(checkpoint=folder).spec.extent) == wanted


def test_a_motion_adapter_says_how_many_frames_it_moves(tmp_path):
    folder = changed(motion_adapter(), tmp_path / "motion", "config.json", motion_max_seq_length=24)
    start = plan(type="ad", checkpoint=checkpoint("sd1"), motion_adapter=folder)
    assert start.spec.extent["num_frames"] == (1, 24)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("wan_t2v", 4),
        ("ltx", 4),
        ("ltx2", 8),
        ("mochi", 6),
        ("cogvideox", 4),
        ("svd", 1),
        ("ad", 1),
    ],
)
def test_lengths_of_videos_follow_from_the_vae(name, step):
    """As the pipelines of these tiny checkpoints compute it."""
    assert plan(checkpoint=checkpoint(name)).spec.frame_step == step


@pytest.mark.parametrize(
    ("name", "channels", "pixels", "widths"),
    [
        ("sd1", 4, 8, (32, None)),
        ("sdxl", 4, 8, (96, 64)),
        ("sd3", 16, 8, (64, 64)),
        ("sdup", 4, 4, (32, None)),
        ("kolors", 4, 8, (8, 8)),
        ("flux", 16, 8, (32, 32)),
        ("zimage", 16, 8, (32, None)),
    ],
)
def test_a_checkpoint_says_which_latents_and_embeddings_it_takes(name, channels, pixels, widths):
    """As the VAE and the text encoders of these tiny checkpoints make them."""
    spec = plan(checkpoint=checkpoint(name)).spec
    found = spec.latent_channels, spec.latent_pixels, spec.embeds_widths
    assert found == (channels, pixels, widths)
