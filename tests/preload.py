"""Imported once by the fork server, so that rank processes start with the heavy modules loaded. Touches no thread pool."""

import importlib

for name in (
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
):
    importlib.import_module(name)
