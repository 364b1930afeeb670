"""A class without a row equals plain diffusers, and reports its steps."""

import copy
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLAllegro,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    I2VGenXLPipeline,
    ScoreSdeVeScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.ltx2.pipeline_output import LTX2PipelineOutput

from backends.errors import RequestError, UnsupportedError
from backends.files.generic import generic_spec
from backends.generation.generic_run import (
    StepCounter,
    audio_of,
    frames_of,
    generic_arguments,
    own_argument,
)
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.generation.step_driver import step_facts
from backends.generation.text.prompts import PromptCache
from backends.generation.text.unread import UnreadTokens
from backends.loading.offload import apply_vae_options
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from hosts.http.jobs_api import notes_of
from tests.backends import features
from tests.checkpoints import checkpoint, sample_image
from tests.checkpoints.parts import clip_text
from tests.checkpoints.variants import variant
from tests.checkpoints.vocabulary import clip_tokenizer

FRAMES = [sample_image(64, seed=seed) for seed in range(4)]
PROMPTS = {"prompt": "a photo of a cat", "negative_prompt": "a dog"}


def loaded(name: str) -> LoadedPipeline:
    load = LoadRequest(model_type="generic", checkpoint=str(variant(name)), variant="fp32")
    return load_pipeline(generic_spec(variant(name)), load, device=torch.device("cpu"))


def plain(name: str, **arguments: object) -> np.ndarray:
    """uint8 of diffusers' own result."""
    pipe = DiffusionPipeline.from_pretrained(variant(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(3), output_type="np")
    pixels = output.frames[0] if hasattr(output, "frames") else output.images
    return (pixels * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "fields", "num_steps", "side"),
    [
        ("StableDiffusionXLPAGPipeline", {"height": 64, "width": 64}, 4, 8),
        ("StableDiffusionPAGImg2ImgPipeline", {"image": sample_image(64), "strength": 0.6}, 3, 8),
        ("AnimateDiffVideoToVideoPipeline", {"video": FRAMES, "strength": 0.6}, 2, 16),
    ],
)
def test_equals_plain_diffusers_and_reports_each_step(name, fields, num_steps, side):
    pipe, seen = loaded(name), []
    asked = {**PROMPTS, **fields, "num_inference_steps": 4, "guidance_scale": 3.0}
    made = pipe.generate(
        GenerateRequest(**asked, seed=3),
        on_step=lambda step, total, latents: seen.append((step, total, pipe.preview(latents))),
    )
    np.testing.assert_array_equal(made.frames, plain(name, **asked))
    assert [(step, total) for step, total, _ in seen] == [
        (step, num_steps) for step in range(1, num_steps + 1)
    ]
    assert made.num_steps == num_steps
    assert all(preview.shape == (side, side, 3) for *_, preview in seen)
    assert "progress_bar" not in vars(pipe.pipe)


def test_what_the_class_refuses_is_the_clients_mistake():
    pipe = loaded("StableDiffusionXLPAGPipeline")
    with pytest.raises(RequestError, match=r"height=60 and width=64 do not fit .*divisible by 8"):
        pipe.generate(GenerateRequest(prompt="a cat", seed=1, height=60, width=64))
    with pytest.raises(RequestError, match="prompt is missing"):
        pipe.generate(GenerateRequest(seed=1))
    with pytest.raises(RequestError, match="both image and init_image"):
        pipe.generate(
            GenerateRequest(prompt="a", seed=1, image=sample_image(8), init_image=sample_image(8))
        )


class TwoLoops(SimpleNamespace):
    """What StepCounter uses of a pipeline: a prior's loop, and one with a copied scheduler."""

    @property
    def components(self):
        return {"scheduler": self.scheduler, "prior_scheduler": self.prior_scheduler}

    def progress_bar(self, iterable=None, total=None):
        return iterable if iterable is not None else range(total)

    def __call__(self):
        x = torch.zeros(1, 4)
        for scheduler, model in ((self.prior_scheduler, self.prior), (self.scheduler, self.model)):
            other = copy.deepcopy(scheduler)
            assert type(scheduler) is type(other) in (DDIMScheduler, EulerDiscreteScheduler)
            assert "eta" in signature(self.scheduler.step).parameters  # pipelines ask so
            scheduler.set_timesteps(3), other.set_timesteps(3)
            for t in self.progress_bar(scheduler.timesteps):
                noise = model(x)
                x = scheduler.step(noise, t, x).prev_sample
                other.step(noise, t, x)  # as for a sound track: no step of its own


def test_steps_are_counted_over_two_denoisers_and_once_for_copied_schedulers():
    pipe = TwoLoops(
        scheduler=DDIMScheduler(),
        prior_scheduler=EulerDiscreteScheduler(),
        prior=torch.nn.Linear(4, 4),
        model=torch.nn.Linear(4, 4),
    )
    seen = []
    counter = StepCounter(pipe, ("prior", "model"), on_step=lambda *args: seen.append(args[:2]))
    with torch.no_grad(), counter.attached():
        pipe()
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 6), (4, 6), (5, 6)]
    assert "step" not in vars(pipe.scheduler)


def facts_of(parameters, pipeline=""):
    """What generic_arguments uses of the facts about a class."""
    return SimpleNamespace(
        parameters=parameters,
        pipeline=pipeline,
        guidance_argument="",
        call={},
        guidance="none",
        empty_negative=False,
    )


def test_the_first_and_the_last_frame_are_two_images():
    spec = facts_of({"image": None, "last_image": None})
    first, last = FRAMES[:2]
    found = generic_arguments(GenerateRequest(image=[first, last]), spec)
    assert (found["image"], found["last_image"]) == (first, last)


def test_one_image_for_frames_is_a_list():
    spec = facts_of({"conditioning_frames": None})
    found = generic_arguments(GenerateRequest(control_image=FRAMES[0]), spec)
    assert found == {"conditioning_frames": [FRAMES[0]]}


def test_one_image_is_a_list_for_a_class_that_counts_its_images():
    spec = facts_of({"image": None}, "GlmImagePipeline")
    assert generic_arguments(GenerateRequest(image=FRAMES[0]), spec) == {"image": [FRAMES[0]]}


def test_the_size_that_a_class_chose_itself_is_told(caplog):
    """HiDream scales all sizes to about a megapixel, which is 128 latents on a side; here to 16 of
    two pixels.
    """
    pipe = loaded("HiDreamImagePipeline")
    pipe.pipe.default_sample_size = 16
    asked = {"prompt": "a cat", "height": 32, "width": 128, "num_inference_steps": 1, "seed": 1}
    made = pipe.generate(GenerateRequest(**asked))
    assert made.frames.shape[1:3] == (16, 64)
    assert (made.resolved["height"], made.resolved["width"]) == (16, 64)
    assert "HiDreamImagePipeline made 64 x 16 of 128 x 32" in caplog.text
    assert notes_of(made.report) == [
        "the model made 64 x 16 instead of 128 x 32: it scales to sizes of its own."
    ]


@pytest.mark.parametrize(("steps", "more"), [(2, {}), (4, {"intermediate_timesteps": None})])
def test_a_timestep_between_two_steps_is_left_out_of_more_steps(steps, more):
    spec = facts_of({"num_inference_steps": 2, "intermediate_timesteps": 1.3})
    found = generic_arguments(GenerateRequest(num_inference_steps=steps), spec)
    assert found == {"num_inference_steps": steps, **more}


def test_a_sampler_whose_steps_have_other_names_is_not_counted():
    pipe = SimpleNamespace(components={}, scheduler=ScoreSdeVeScheduler(), progress_bar=iter)
    with StepCounter(pipe, (), on_step=print).attached():
        assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_without_a_sampler_has_no_steps_to_skip():
    assert not any(step_facts(None, GenerateRequest()).values())


def test_a_vae_that_decodes_in_tiles_only_is_made_to():
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    load = LoadRequest(model_type="generic", checkpoint="here", variant="fp32")
    apply_vae_options(SimpleNamespace(vae=vae), load)
    assert vae.use_tiling


@pytest.mark.parametrize(
    ("sound", "shape"), [(torch.ones(1, 2, 9), (2, 9)), (torch.full((1, 9), 3.0), (1, 9))]
)
def test_the_sound_of_a_video_is_kept_with_its_rate(sound, shape):
    vocoder = SimpleNamespace(config={"output_sampling_rate": 24000})
    made = audio_of(LTX2PipelineOutput(frames=None, audio=sound), SimpleNamespace(vocoder=vocoder))
    assert (made.samples.shape, made.sampling_rate) == (shape, 24000)
    assert made.samples.max() == 1
    with pytest.raises(UnsupportedError, match="nothing says its sampling rate"):
        audio_of(LTX2PipelineOutput(frames=None, audio=sound), SimpleNamespace())


@pytest.mark.parametrize(
    ("output", "kind", "shape"),
    [
        (SimpleNamespace(images=np.ones((1, 4, 6, 3))), "image", (1, 4, 6, 3)),
        (SimpleNamespace(images=[sample_image(8)]), "image", (1, 8, 8, 3)),
        (SimpleNamespace(images=[np.ones((3, 4, 6, 4))]), "image", (3, 4, 6, 4)),  # layers
        (SimpleNamespace(frames=[[sample_image(8)] * 2]), "video", (2, 8, 8, 3)),
        (SimpleNamespace(frames=np.ones((1, 5, 4, 6, 3))), "video", (5, 4, 6, 3)),
        (SimpleNamespace(frames=torch.ones(1, 5, 3, 4, 6)), "video", (5, 4, 6, 3)),
        (SimpleNamespace(images=np.ones((2, 4, 6, 1))), "image", (2, 4, 6, 3)),
        ((np.ones((1, 4, 6, 3)),), "image", (1, 4, 6, 3)),
    ],
)
def test_frames_of_every_kind_of_output(output, kind, shape):
    frames = frames_of(output, kind)
    assert (frames.shape, frames.dtype) == (shape, np.uint8)


def test_arguments_of_a_request_may_be_objects():
    sent = {"object": {"template": "{}", "crop_start": 0, "steps": [{"object": {"at": 1}}]}}
    wanted = {"template": "{}", "crop_start": 0, "steps": [{"at": 1}]}
    assert own_argument(sent) == wanted


def test_prompts_encoded_without_guidance_are_no_answer_with_it():
    """I2VGen-XL encodes the negative prompt only if the scale says so, which it reads itself."""
    parts = {"text_encoder": clip_text(), "tokenizer": clip_tokenizer()}
    others = ("vae", "image_encoder", "feature_extractor", "unet", "scheduler")
    pipe = I2VGenXLPipeline(**parts, **dict.fromkeys(others))
    PromptCache(pipe, UnreadTokens(pipe), facts=lambda: {})
    negatives = []
    for pipe._guidance_scale in (1.0, 9.0, 9.0):
        _, negative = pipe.encode_prompt("a photo of a cat", torch.device("cpu"), 1)
        negatives.append(negative)
    assert negatives[0] is None
    assert torch.equal(negatives[1], negatives[2])


@pytest.mark.parametrize("name", ["heun", "dpmpp_sde"])
def test_a_sampler_keeps_its_sample_though_the_class_overwrites_it(name):
    """Kandinsky 5 writes each step's result into the tensor that it passed to the scheduler."""
    load = LoadRequest(
        model_type="kandinsky5", checkpoint=str(checkpoint("kandinsky5")), variant="fp32"
    )
    pipe = load_pipeline(read_table()["kandinsky5"], load, device=torch.device("cpu"))

    def drawn(scheduler: str, steps: int, seed: int = 3) -> np.ndarray:
        asked = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": steps}
        request = GenerateRequest(prompt="a cat", seed=seed, scheduler=scheduler, **asked)
        return pipe.generate(request).frames.astype(float)

    solution = drawn("euler", 30)
    assert abs(drawn(name, 15) - solution).mean() < 2 < abs(drawn("euler", 15, 4) - solution).mean()


def test_a_prompt_longer_than_the_table_of_positions_is_refused():
    """Qwen-Image-Edit reads all of a prompt, and its denoiser has 4096 positions."""
    name = "qwenimage_edit"
    folder = str(checkpoint(name))
    pipe = load_pipeline(
        read_table()[name],
        LoadRequest(model_type=name, checkpoint=folder, variant="fp32"),
        device=torch.device("cpu"),
    )
    asked = {"image": sample_image(32), "height": 32, "width": 32, "num_inference_steps": 1}
    with pytest.raises(RequestError, match=r"prompt is too long.* tokens") as refused:
        pipe.generate(GenerateRequest(prompt="cat " * 2100, seed=1, **asked))
    assert refused.value.field == "prompt"
    pipe.generate(GenerateRequest(prompt="cat", seed=1, **asked))


def test_a_scheduler_that_keeps_what_the_class_overwrites_is_left_as_diffusers_has_it(tmp_path):
    """SkyReels' diffusion forcing steps slices of its latents in place, with a copy of the
    scheduler for each frame. UniPC keeps its last sample.
    """
    parts = DiffusionPipeline.from_pretrained(checkpoint("skyreels"), local_files_only=True)
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    components = {**parts.components, "scheduler": scheduler}
    taken = signature(SkyReelsV2DiffusionForcingPipeline).parameters
    pipe = SkyReelsV2DiffusionForcingPipeline(**{name: components[name] for name in taken})
    pipe.save_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    asked = {**PROMPTS, "height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 4}
    output = pipe(**asked, generator=torch.Generator().manual_seed(3), output_type="np")
    load = LoadRequest(model_type="generic", checkpoint=str(tmp_path), variant="fp32")
    ours = load_pipeline(generic_spec(tmp_path), load, device=torch.device("cpu"))
    made = ours.generate(GenerateRequest(**asked, seed=3))
    np.testing.assert_array_equal(made.frames, (output.frames[0] * 255).round().astype(np.uint8))


@pytest.mark.slow
def test_a_step_too_few_for_the_class_is_the_requests_mistake():
    """Mochi divides by half the number of steps."""
    pipe = features.loaded(read_table()["mochi"])
    with pytest.raises(RequestError, match="refuses this request"):
        pipe.generate(features.request_for(pipe.spec, height=64, width=64, num_inference_steps=1))
