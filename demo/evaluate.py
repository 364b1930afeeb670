"""Measure a checkpoint on the 100 fixed held-out captions: `python -m demo.evaluate demo/checkpoint
--size 256`.

Images come from the real StableDiffusionXLPipeline with the scheduler saved in the checkpoint.
Writes the measures as JSON and the images as one contact sheet; `--help` needs no torch.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from demo.data import Scene, evaluation_scenes
from demo.judge import MEASURES, judge

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

SHEET_COLUMNS = 10
SHEET_TILE = 96


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate", description="Measure a demo checkpoint."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--size", type=int, help="height and width in pixels (default: the checkpoint's)"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument(
        "--count",
        type=int,
        default=100,
        help="how many of the captions, evenly spread over the kinds",
    )
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument(
        "--json", type=Path, help="where to write the measures (default: only printed)"
    )
    parser.add_argument("--sheet", type=Path, help="where to write the contact sheet, a PNG")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    return parser


def load(checkpoint: Path) -> "StableDiffusionXLPipeline":
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def generate(
    pipe: "StableDiffusionXLPipeline", captions: list[str], *, seed: int, **inputs: float
) -> list[np.ndarray]:
    """Return one (H, W, 3) uint8 image per caption, generated in one batch.

    Image i starts from noise with seed + i.
    """
    import torch

    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
    return [np.asarray(image) for image in pipe(captions, generator=generators, **inputs).images]


def summary(scenes: list[Scene], verdicts: list[dict[str, bool]]) -> dict[str, object]:
    """Return the share of right images per measure and kind of caption, and what went wrong."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    wrong = {}
    for scene, verdict in zip(scenes, verdicts, strict=True):
        by_kind[scene.kind].append(verdict["all"])
        if not verdict["all"]:
            wrong[scene.caption] = [measure for measure in MEASURES[:-1] if not verdict[measure]]
    shares = {
        measure: round(sum(verdict[measure] for verdict in verdicts) / len(verdicts), 3)
        for measure in MEASURES
    }
    return shares | {
        "all_by_kind": {kind: f"{sum(good)}/{len(good)}" for kind, good in by_kind.items()},
        "wrong": wrong,
    }


def contact_sheet(images: list[np.ndarray]) -> Image.Image:
    """Return the images in reading order, SHEET_COLUMNS per row."""
    rows = -(-len(images) // SHEET_COLUMNS)
    pitch = SHEET_TILE + 2
    sheet = Image.new("RGB", (SHEET_COLUMNS * pitch, rows * pitch), (128, 128, 128))
    for i, image in enumerate(images):
        row, column = divmod(i, SHEET_COLUMNS)
        sheet.paste(
            Image.fromarray(image).resize((SHEET_TILE, SHEET_TILE), Image.LANCZOS),
            (column * pitch, row * pitch),
        )
    return sheet


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    import torch

    torch.set_num_threads(args.threads)
    scenes = evaluation_scenes()
    scenes = [scenes[i * len(scenes) // args.count] for i in range(args.count)]
    pipe = load(args.checkpoint)
    size = args.size or pipe.default_sample_size * pipe.vae_scale_factor
    inputs = {
        "height": size,
        "width": size,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
    }
    images: list[np.ndarray] = []
    began = time.monotonic()
    for at in range(0, len(scenes), args.batch):
        images += generate(
            pipe, [scene.caption for scene in scenes[at : at + args.batch]], seed=at, **inputs
        )
    seconds = time.monotonic() - began
    verdicts = [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]
    if args.sheet:
        contact_sheet(images).save(args.sheet, optimize=True)
    return {
        "images": len(scenes),
        **inputs,
        "seconds": round(seconds, 1),
        **summary(scenes, verdicts),
    }


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    report = json.dumps(evaluate(args), indent=1)
    if args.json:
        args.json.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
