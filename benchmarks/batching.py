"""Time per image in a batch compared with a single image: one rank, the demo model.

    python -m benchmarks.batching [--sizes 128,256] [--batches 1,2,4] [--steps 12] [--rounds 3]

Loads the model once, in this process, with one thread on a CPU. Runs batches of each size in turn
and prints JSON: the median seconds per image, also relative to a single image.
hosts/jobs/batch_size.py learns the same while a host serves.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.groups.devices import select_device
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="128,256")
    parser.add_argument("--batches", default="1,2,4")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = select_device(0)
    spec = read_table()["sdxl"]
    load = LoadRequest(
        model_type="sdxl",
        checkpoint=str(ROOT / spec.demo["checkpoint"]),
        variant="fp16" if device.type == "cuda" else "fp32",
    )
    pipeline = load_pipeline(spec, load, device=device)
    batches = [int(batch) for batch in options.batches.split(",")]
    found = {
        side: measured(pipeline, int(side), batches, steps=options.steps, rounds=options.rounds)
        for side in options.sizes.split(",")
    }
    print(
        json.dumps(
            {
                "device": str(device),
                "steps": options.steps,
                "rounds": options.rounds,
                "sizes": found,
            },
            indent=2,
        )
    )


def measured(
    pipeline: LoadedPipeline, side: int, batches: list[int], *, steps: int, rounds: int
) -> dict[str, dict[int, float]]:
    """Return the seconds per image for images of side x side pixels."""
    made: dict[int, list[float]] = {batch: [] for batch in batches}
    for number in range(rounds + 1):
        for batch, seconds in made.items():
            requests = [
                GenerateRequest(
                    prompt="a red circle on a blue background",
                    seed=seed,
                    num_inference_steps=steps,
                    height=side,
                    width=side,
                    guidance_scale=2.5,
                )
                for seed in range(batch)
            ]
            started = time.perf_counter()
            pipeline.generate_together(requests)
            if number:  # the first round includes first-use costs
                seconds.append((time.perf_counter() - started) / batch)
    medians = {batch: statistics.median(seconds) for batch, seconds in made.items()}
    return {
        "seconds_per_image": {batch: round(seconds, 4) for batch, seconds in medians.items()},
        "share_of_alone": {
            batch: round(seconds / medians[min(medians)], 3) for batch, seconds in medians.items()
        },
    }


if __name__ == "__main__":
    main()
