"""Closeness of a backend's settings to one rank on the demo model: PSNR and a sheet.

    python -m benchmarks.quality --backend distrifuser --prompts 20 \\
        --sheet docs/quality_distrifuser.png > result.json

All ranks generate every image. Rank 0 generates the reference first, while the others wait. Both
use the same seeds and the scheduler of the checkpoint.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw
from torch import Tensor

from backends import BACKEND_NAMES, backend_class, planner
from backends.errors import HostError
from backends.generation.schedulers import build_scheduler, parse_scheduler
from backends.generation.step_driver import step_facts
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Mesh
from backends.loading.caches.step_cache import AnyCache, attached_cache
from backends.model_table import read_table
from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from backends.step_cache_spec import parse_step_cache, require_step_cache
from benchmarks.closeness import psnr
from benchmarks.settings import SETTINGS
from demo.data import evaluation_scenes

MODEL_TYPE = "sdxl"
CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
SIDE = 128
SHEET_ROWS = 6
LABEL_HEIGHT = 16


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (arguments, folder), nprocs=arguments.ranks, start_method="spawn")
        print(Path(folder, "result.json").read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend", choices=[name for name in BACKEND_NAMES if name != "single"], required=True
    )
    parser.add_argument(
        "--settings", help="names from benchmarks/settings.py, with commas; all if left out"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument(
        "--warmup_steps",
        type=_counts,
        default=[4],
        metavar="N,N",
        help="synchronous steps; each number is a run",
    )
    parser.add_argument(
        "--step_cache", nargs="*", default=[""], help="such as deep,2; each one is a run"
    )
    parser.add_argument(
        "--scheduler", help="a name, or JSON as in a request; the model's own if left out"
    )
    parser.add_argument("--checkpoint", default=str(CHECKPOINT))
    parser.add_argument("--sheet", help="PNG of the first prompts, one column per setting")
    return parser.parse_args()


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=arguments.ranks
    )
    try:
        result = measure(rank, arguments)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result, indent=2))
    finally:
        dist.destroy_process_group()


def measure(rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    pipe = StableDiffusionXLPipeline.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    choice = parse_scheduler(arguments.scheduler)
    pipe.scheduler = build_scheduler(choice, pipe.scheduler, flow=False)
    prompts = [scene.caption for scene in evaluation_scenes(arguments.prompts)]
    names = (
        arguments.settings.split(",") if arguments.settings else list(SETTINGS[arguments.backend])
    )
    wanted = (
        [_latents(pipe, prompt, seed, arguments) for seed, prompt in enumerate(prompts)]
        if rank == 0
        else []
    )
    gather_outcomes(None)  # the others wait here
    columns, results = {"one rank": wanted}, {}
    for name, warmup_steps, text in product(names, arguments.warmup_steps, arguments.step_cache):
        label = name if len(arguments.warmup_steps) == 1 else f"{name} {warmup_steps}"
        label += f" + {text}" if text else ""
        with _step_cache(pipe, text) as cache:
            latents = _setting(
                rank,
                pipe,
                prompts,
                SETTINGS[arguments.backend][name],
                warmup_steps,
                arguments,
                cache,
            )
        if rank == 0:
            results[label] = latents if isinstance(latents, dict) else _figures(latents, wanted)
            columns |= {} if isinstance(latents, dict) else {label: latents}
            print(label, results[label], file=sys.stderr, flush=True)
    if rank == 0 and arguments.sheet:
        _sheet(pipe, prompts, columns).save(arguments.sheet, optimize=True)
    given = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("sheet", "settings", "checkpoint")
    }
    return {"run": given, "settings": results, "prompts": prompts}


@contextmanager
def _step_cache(pipe: Any, text: str) -> Iterator[AnyCache | None]:
    """Attach the step cache of this name, if there is one."""
    if not text:
        yield None
        return
    spec = read_table()[MODEL_TYPE]
    cache = attached_cache(parse_step_cache(text, spec), spec, pipe)
    yield cache
    cache.detach()


def _setting(
    rank: int,
    pipe: Any,
    prompts: list[str],
    options: dict[str, Any],
    warmup_steps: int,
    arguments: argparse.Namespace,
    cache: AnyCache | None,
) -> list[Tensor] | dict[str, str]:
    """Return the final latents of every prompt under one setting, or why it was refused."""
    spec = read_table()[MODEL_TYPE]
    try:
        plan = planner(arguments.backend)(spec, options, arguments.ranks)
        if cache is not None:
            require_step_cache(cache.spec, plan)
    except HostError as error:
        return {"refused": str(error)}
    mesh = Mesh(plan, rank=rank, device=torch.device("cpu"))
    backend = backend_class(arguments.backend)(spec=spec, plan=plan, mesh=mesh)
    try:
        backend.attach(pipe)
    except HostError as error:
        mesh.destroy()
        return {"refused": str(error)}
    try:
        return [
            _latents(pipe, prompt, seed, arguments, backend, warmup_steps, cache)
            for seed, prompt in enumerate(prompts)
        ]
    except HostError as error:
        return {"refused": str(error)}
    finally:
        backend.detach(pipe)
        mesh.destroy()


def _latents(
    pipe: Any,
    prompt: str,
    seed: int,
    arguments: argparse.Namespace,
    backend: Any = None,
    warmup_steps: int | None = None,
    cache: AnyCache | None = None,
) -> Tensor:
    """Return the final latents of one prompt. Without a backend it runs on one rank."""
    request = GenerateRequest(
        prompt=prompt,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        warmup_steps=warmup_steps,
    )
    run = RunInfo(
        request=request,
        height=SIDE,
        width=SIDE,
        num_inference_steps=arguments.steps,
        step_cache=cache.spec if cache is not None else None,
    )

    def step_done(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        ran = cache is None or cache.step_done(arguments.steps)
        if backend is not None and ran:
            backend.step_done()
        return {}

    if backend is not None:
        backend.check(run)
        backend.begin(run)
    if cache is not None:
        cache.begin(
            is_on=not cache.spec.skips_whole_steps
            or step_facts(pipe.scheduler, request)["is_smooth"]
        )
    try:
        return pipe(
            prompt,
            height=SIDE,
            width=SIDE,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=step_done,
        ).images
    finally:
        for part in filter(None, (backend, cache)):
            part.end()


def _figures(latents: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    values = [psnr(got, want) for got, want in zip(latents, wanted, strict=True)]
    return {
        "mean_db": round(statistics.mean(values), 1),
        "worst_db": min(values),
        "max_difference": max(
            float((got - want).abs().max()) for got, want in zip(latents, wanted, strict=True)
        ),
    }


def _sheet(pipe: Any, prompts: list[str], columns: dict[str, list[Tensor]]) -> Image.Image:
    """Return a contact sheet: one row per prompt, one named column per setting."""
    side, rows = SIDE, min(SHEET_ROWS, len(prompts))
    sheet = Image.new("RGB", (side * len(columns), LABEL_HEIGHT + side * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, latents) in enumerate(columns.items()):
        draw.text((column * side + 3, 2), name, fill="black")
        for row in range(rows):
            with torch.no_grad():
                pixels = pipe.vae.decode(
                    latents[row] / pipe.vae.config.scaling_factor, return_dict=False
                )[0]
            sheet.paste(
                pipe.image_processor.postprocess(pixels)[0],
                (column * side, LABEL_HEIGHT + row * side),
            )
    return sheet


if __name__ == "__main__":
    main()
