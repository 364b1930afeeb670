"""Imported once by the fork server, so that rank processes start with the heavy modules loaded. Touches no thread pool."""

import importlib

for name in (
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.animatediff.pipeline_animatediff",
    "diffusers.pipelines.flux.pipeline_flux",
    "backends.pipeline",
    "backends.asyncdiff.backend",
    "backends.distrifuser.backend",
    "backends.xdit.backend",
):
    importlib.import_module(name)
