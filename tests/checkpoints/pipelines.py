"""One builder per model type: denoiser config -> pipeline with random weights. Schedulers as in the
published checkpoints.
"""

from collections.abc import Callable

from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
)

from tests.checkpoints import denoisers, modern, parts
from tests.checkpoints.parts import clip_text, t5_text
from tests.checkpoints.vocabulary import bert_tokenizer, clip_tokenizer, t5_tokenizer

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_SAFETY_CHECKER = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def ad(**config: object) -> DiffusionPipeline:
    unet = denoisers.unet(**config)
    return AnimateDiffPipeline(
        vae=parts.vae(scaling_factor=0.18215),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        motion_adapter=denoisers.motion_adapter(tuple(unet.config.block_out_channels)),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="linear",
            clip_sample=False,
            timestep_spacing="linspace",
            steps_offset=1,
        ),
    )


def sd1(**config: object) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=parts.vae(scaling_factor=0.18215),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=denoisers.unet(**config),
        scheduler=PNDMScheduler(
            **SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        ),
        **NO_SAFETY_CHECKER,
    )


def sd2(**config: object) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=parts.vae(scaling_factor=0.18215),
        text_encoder=clip_text(hidden_act="gelu"),
        tokenizer=clip_tokenizer("!"),
        unet=denoisers.unet_sd2(**config),
        scheduler=DDIMScheduler(
            **SD_BETAS,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        **NO_SAFETY_CHECKER,
    )


def sd3(**config: object) -> DiffusionPipeline:
    transformer = denoisers.transformer_sd3(**config)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(hidden_act="gelu", projection=True),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5_text(transformer.config.joint_attention_dim),
        tokenizer_3=t5_tokenizer(512),
    )


def sdup(**config: object) -> DiffusionPipeline:
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    return StableDiffusionUpscalePipeline(
        vae=parts.vae(channels=(8, 16, 16), scaling_factor=0.08333),
        text_encoder=clip_text(hidden_act="gelu"),
        tokenizer=clip_tokenizer("!"),
        unet=denoisers.unet_upscale(**config),
        low_res_scheduler=DDPMScheduler(**betas),
        scheduler=DDIMScheduler(
            **betas,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        max_noise_level=350,
    )


def sdxl(**config: object) -> DiffusionPipeline:
    """The second encoder is twice as wide as the first: in a single file, diffusers tells the two
    apart by their width.
    """
    return StableDiffusionXLPipeline(
        vae=parts.vae(scaling_factor=0.13025),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(hidden_act="gelu", projection=True, width=2 * parts.WIDTH),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=denoisers.unet_sdxl(**config),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
    )


def svd(**config: object) -> DiffusionPipeline:
    """The pipeline resizes its image to 224 x 224 in code, so the image encoder has that size."""
    return StableVideoDiffusionPipeline(
        vae=parts.video_vae(),
        image_encoder=parts.clip_vision(image_size=224, patch_size=28),
        unet=denoisers.unet_video(**config),
        scheduler=EulerDiscreteScheduler(
            **SD_BETAS,
            prediction_type="v_prediction",
            timestep_spacing="leading",
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
            steps_offset=1,
        ),
        feature_extractor=parts.image_processor(224),
    )


def flux(**config: object) -> DiffusionPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=parts.vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(512),
        transformer=denoisers.transformer_flux(**config),
    )


def flux_kontext(**config: object) -> DiffusionPipeline:
    return FluxKontextPipeline(**flux(**config).components)


def hy(**config: object) -> DiffusionPipeline:
    return HunyuanDiTPipeline(
        vae=parts.vae(scaling_factor=0.13025),
        text_encoder=parts.bert_text(),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(256),
        transformer=denoisers.transformer_hunyuan(**config),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        **NO_SAFETY_CHECKER,
    )


def pixa(**config: object) -> DiffusionPipeline:
    return _pixart(PixArtAlphaPipeline, max_length=120, scaling_factor=0.18215, config=config)


def pixs(**config: object) -> DiffusionPipeline:
    return _pixart(PixArtSigmaPipeline, max_length=300, scaling_factor=0.13025, config=config)


def _pixart(
    pipeline: type, *, max_length: int, scaling_factor: float, config: dict[str, object]
) -> DiffusionPipeline:
    return pipeline(
        tokenizer=t5_tokenizer(max_length),
        text_encoder=t5_text(),
        vae=parts.vae(scaling_factor=scaling_factor),
        transformer=denoisers.transformer_pixart(**config),
        scheduler=DPMSolverMultistepScheduler(
            beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2
        ),
    )


MODERN = (modern.zimage, modern.qwenimage, modern.flux2, modern.wan_t2v)
BUILDERS: dict[str, Callable[..., DiffusionPipeline]] = {
    build.__name__: build
    for build in (ad, sd1, sd2, sd3, sdup, sdxl, svd, flux, flux_kontext, hy, pixa, pixs, *MODERN)
}
