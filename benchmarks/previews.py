"""Cost of previews: seconds for a step's small image and its JPEG, relative to a UNet step.

    python -m benchmarks.previews [--rounds 5]

One thread, random weights, 64 x 64 latents. Steps and previews take turns, so that the load
affects both alike. Prints JSON. The fit runs once per loaded model, at the first preview.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from backends.generation.previews import Previewer
from backends.model_table import read_table
from benchmarks.models import sdxl_like_unet, sdxl_like_vae
from hosts.http import jobs_api

TIMESTEP = torch.tensor(500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().rounds), indent=2))


@torch.no_grad()
def measure(rounds: int) -> dict[str, float]:
    """Return medians over the rounds in seconds, and shares of a step in percent."""
    torch.set_num_threads(1)
    subject = sdxl_like_unet()
    subject.pipe.vae = sdxl_like_vae()
    previewer = Previewer(subject.pipe, spec=read_table()[subject.model_type])
    side = 8 * subject.sample.shape[-1]
    fit_s, _ = _timed(lambda: previewer.image(subject.sample, height=side, width=side))
    subject.predict(subject.sample, TIMESTEP)  # the first call includes first-use costs
    steps, images, files = [], [], []
    for _ in range(rounds):
        steps.append(_timed(lambda: subject.predict(subject.sample, TIMESTEP))[0])
        seconds, image = _timed(lambda: previewer.image(subject.sample, height=side, width=side))
        images.append(seconds)
        files.append(_timed(lambda: jobs_api._data_url(image))[0])  # noqa: B023  called at once
    step_s, preview_s, jpeg_s = (statistics.median(values) for values in (steps, images, files))
    figures = {"step_s": step_s, "preview_s": preview_s, "jpeg_s": jpeg_s, "fit_once_s": fit_s}
    shares = {
        "preview_percent": 100 * preview_s / step_s,
        "preview_and_jpeg_percent": 100 * (preview_s + jpeg_s) / step_s,
    }
    return {name: round(value, 5) for name, value in (figures | shares).items()}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
