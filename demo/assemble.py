"""Training stage `assemble`: writes averaged weights and VAE as a diffusers folder (SDXL, fp16)."""

import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from demo.model import TextToLatents, load_tokenizer, make_scheduler

logger = logging.getLogger(__name__)

SIZE_LIMIT_BYTES = 16_000_000


def assemble(folder: Path, out: Path, *, size: int) -> None:
    """Write the checkpoint from the states in `folder`.

    `size` becomes the default height and width in pixels. The old content of `out` is replaced only
    once the new one is complete. ValueError if that exceeds 16 MB.
    """
    tokenizer = load_tokenizer(folder)
    net = TextToLatents(len(tokenizer))
    net.load_state_dict(torch.load(folder / "unet_state.pt")["average"])
    net.unet.register_to_config(sample_size=size // 8)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32, local_files_only=True)
    vae.register_to_config(
        sample_size=size, _name_or_path=""
    )  # else the work folder's path is saved
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=net.text_encoder,
        text_encoder_2=net.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=net.unet,
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    fresh = out.with_name(out.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    total = sum(file.stat().st_size for file in fresh.rglob("*") if file.is_file())
    if total > SIZE_LIMIT_BYTES:
        raise ValueError(
            f"the checkpoint in {fresh} has {total} bytes. At most {SIZE_LIMIT_BYTES} are allowed. "
            "Make the model narrower."
        )
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    logger.info("%s: %.1f MB", out, total / 1e6)
