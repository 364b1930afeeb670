"""Inpainting: what the mask keeps comes back, and one device draws what diffusers' own inpainting
pipelines draw.
"""

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from backends.errors import RequestError, UnsupportedError
from backends.generation import latents as latent_space
from tests.backends.features import TABLE, half_mask, loaded, request_for
from tests.checkpoints import sample_image

SIDE = 64


def fields(spec, **others):
    size = {
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "warmup_steps": None,
    }
    return request_for(
        spec,
        **{"init_image": sample_image(SIDE), "mask_image": half_mask(SIDE, SIDE), **size, **others},
    )


def scheduler_of(spec):
    return "fm_euler" if spec.flow_matching else "ddim"


@pytest.mark.parametrize(
    "name",
    [
        "sdxl",
        "flux",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sd1", "sd2", "sd3", "zimage", "qwenimage")
        ),
    ],
)
def test_one_device_draws_what_diffusers_inpainting_pipeline_draws(name, monkeypatch):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )  # ours takes the middle too
    spec = TABLE[name]
    pipe = loaded(spec)
    theirs = AutoPipelineForInpainting.from_pipe(pipe.pipe)
    theirs.set_progress_bar_config(disable=True)
    assert "Inpaint" in type(theirs).__name__
    for strength in (0.6, 1.0):
        asked = fields(spec, strength=strength, scheduler=scheduler_of(spec))
        ours = pipe.generate(asked)
        theirs.scheduler = type(pipe.pipe.scheduler).from_config(pipe.pipe.scheduler.config)
        given = {
            "prompt": asked.prompt,
            "image": sample_image(SIDE),
            "mask_image": half_mask(SIDE, SIDE),
            "strength": strength,
        }
        given |= {"negative_prompt": spec.empty_negative} if spec.empty_negative else {}
        size = {
            "height": SIDE,
            "width": SIDE,
            "num_inference_steps": 5,
            spec.guidance_argument: 3.0,
        }
        with torch.no_grad():
            made = theirs(
                **given,
                **size,
                generator=torch.Generator().manual_seed(asked.seed),
                output_type="latent",
            ).images
        wanted = latent_space.to_client_space(
            made, pipe=pipe.pipe, spec=spec, height=SIDE, width=SIDE
        )
        np.testing.assert_allclose(
            ours.latents,
            wanted,
            rtol=0,
            atol=2e-5 * np.abs(wanted).max(),
            err_msg=f"strength {strength}",
        )


@pytest.fixture(scope="module")
def sdxl():
    return loaded(TABLE["sdxl"])


@pytest.mark.parametrize(
    "scheduler", ["euler_a", "heun", "dpmpp_2m", "dpm_2_a", "pndm", "lms", "tcd"]
)
def test_black_parts_stay_and_white_parts_change_with_every_kind_of_sampler(sdxl, scheduler):
    clean = latent_space.encode(sample_image(SIDE), pipe=sdxl.pipe, height=SIDE, width=SIDE)
    for strength in (0.5, 1.0):
        made = sdxl.generate(fields(TABLE["sdxl"], scheduler=scheduler, strength=strength)).latents
        change = np.abs(made - clean).max(axis=(0, 1))
        assert change[:, SIDE // 16 :].max() < 1e-4 and change[:, : SIDE // 16].min() > 1e-3


def test_run_that_ends_early_leaves_the_kept_parts_as_noisy_as_the_rest(sdxl):
    """Its result is noisy, and another run may go on from it."""
    spec = TABLE["sdxl"]
    clean = latent_space.encode(sample_image(SIDE), pipe=sdxl.pipe, height=SIDE, width=SIDE)
    made = sdxl.generate(fields(spec, scheduler="ddim", denoising_end=0.5)).latents
    assert np.abs(made - clean)[..., SIDE // 16 :].mean() > 0.1


def test_mask_without_a_image_is_refused(sdxl):
    with pytest.raises(RequestError, match="mask_image was given without init_image") as caught:
        sdxl.check(fields(TABLE["sdxl"], init_image=None))
    assert caught.value.field == "mask_image"


@pytest.mark.parametrize("name", ["pixs", pytest.param("svd", marks=pytest.mark.slow)])
def test_type_without_inpainting_says_why(name):
    with pytest.raises(
        UnsupportedError,
        match=(
            r"inpainting with backend 'single' is not available .* diffusers has no inpainting "
            r"pipeline"
        ),
    ):
        loaded(TABLE[name]).check(fields(TABLE[name]))
