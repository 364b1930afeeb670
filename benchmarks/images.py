"""Seconds of a whole image over HTTP: settings of two ranks, in turns with one rank.

    python -m benchmarks.images --model unet --settings cfg cfg+prediction,2 segments > images.json

A host of one rank runs all the time, and one of two ranks for each setting. They take turns, one
image each, so that `times_faster` compares neighbours; an image before the first is not counted.
The networks have random weights (benchmarks/option_files.py), so closeness is not measured here:
benchmarks/quality.py does that on the demo model. Needs two free cores, and about 5 GB.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.option_files import folder_of
from benchmarks.throughput import started

TYPES = {"unet": "sdxl", "dit": "sd3"}
METHODS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "unet": {
        "cfg": ("--backend=distrifuser",),
        "patches": ("--backend=distrifuser", "--no_split_batch"),
        "segments": ("--backend=asyncdiff", "--model_n=2", "--stride=1"),
    },
    "dit": {
        "cfg": ("--backend=xdit", "--use_cfg_parallel"),
        "ulysses": ("--backend=xdit", "--ulysses_degree=2"),
        "segments": ("--backend=asyncdiff", "--model_n=2", "--stride=1"),
    },
}


def main() -> None:
    options = _options()
    body = {
        "prompt": "a red circle on a blue background",
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "height": options.side,
        "width": options.side,
    }
    model = TYPES[options.model]
    common = (f"--type={model}", f"--checkpoint={folder_of(model)}", "--spare_ranks=false")
    figures = {}
    with started(options.port, body, *common, "--nproc_per_node=1") as one:
        one.alone(0)
        for name in options.settings:
            method, _, cache = name.partition("+")
            chosen = (
                *METHODS[options.model][method],
                *([f"--step_cache={cache}"] if cache else []),
            )
            arguments = (*common, "--nproc_per_node=2", *chosen)
            with started(options.port + 1, body, *arguments) as two:
                two.alone(0)
                rounds = [(one.alone(seed), two.alone(seed)) for seed in range(options.rounds)]
            ratios = [before / after for before, after in rounds]
            figures[name] = {
                "arguments": " ".join(chosen),
                "times_faster": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
                "seconds": [[round(second, 2) for second in pair] for pair in rounds],
            }
    asked = ("model", "steps", "side", "guidance", "rounds")
    print(json.dumps({**{name: getattr(options, name) for name in asked}, **figures}, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*TYPES], default="unet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["cfg", "cfg+prediction,2", "cfg+prediction,3"],
        help="method, or method+step cache",
    )
    parser.add_argument("--port", type=int, default=6095)
    options = parser.parse_args()
    known = METHODS[options.model]
    if unknown := [name for name in options.settings if name.partition("+")[0] not in known]:
        parser.error(f"--settings: {', '.join(unknown)}. Allowed: {', '.join(known)}.")
    return options


if __name__ == "__main__":
    main()
