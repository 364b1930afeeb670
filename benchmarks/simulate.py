"""Predicts speed-ups for more ranks than this machine has, for published models and link speeds.

    python -m benchmarks.simulate --model sdxl --ranks 4,8,16 --link_gbps 25,200,900

Nothing runs. Bytes follow from the models' published configurations; seconds of one rank from
`--tflops`, or from a measured step (`--step_s`). `--link_gbps` is in gigabits per second and
direction, of each rank: 25 is Ethernet, 200 InfiniBand, 900 a link within a machine. Prints the
best method of each number of ranks that divides the given one; --json prints everything.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

from backends.autotune.candidates import list_candidates
from backends.autotune.cost import Link, Work
from backends.autotune.estimate import DEVICES, ELEMENT_BYTES, Device, estimate_config
from backends.autotune.ranking import Image, Measured, Row, choose, rank
from backends.model_table import ModelSpec, read_table
from backends.plan import QUALITIES
from hosts.launch.auto_backend import halves_of

PUBLISHED: dict[str, dict[str, Any]] = {
    "sdxl": {
        "config": {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
        },
        "num_weights": 2_570_000_000,
        "other_weights": 900_000_000,
    },
    "sd3": {
        "config": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "in_channels": 16,
        },
        "num_weights": 2_030_000_000,
        "other_weights": 5_700_000_000,
    },
    "flux": {
        "config": {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 16,
        },
        "num_weights": 11_900_000_000,
        "other_weights": 4_970_000_000,
    },
    "pixs": {
        "config": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
        "num_weights": 610_000_000,
        "other_weights": 4_850_000_000,
    },
    "qwenimage": {
        "config": {
            "num_layers": 60,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 16,
        },
        "num_weights": 20_400_000_000,
        "other_weights": 8_400_000_000,
    },
}
"""Denoisers of published sizes. other_weights: text encoders and VAE. qwenimage's two calls
count as two halves.
"""


def main() -> None:
    arguments = _arguments()
    result = simulate(arguments)
    print(json.dumps(result, indent=1) if arguments.json else "\n".join(_table(result)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*PUBLISHED], default="sdxl")
    parser.add_argument("--ranks", default="4,8,16")
    parser.add_argument("--link_gbps", default="25,200,900")
    parser.add_argument("--latency_us", type=float, default=30.0, help="of a message")
    parser.add_argument("--side", type=int, default=1024, help="height and width in pixels")
    parser.add_argument(
        "--tflops",
        type=float,
        default=DEVICES["gpu"].operations_per_s / 1e12,
        help="what one rank reaches, in 10^12 per second",
    )
    parser.add_argument(
        "--step_s", type=float, help="measured seconds of a step on one rank, in place of --tflops"
    )
    parser.add_argument("--memory_gb", type=float, help="of one rank, in 10^9 bytes")
    parser.add_argument("--quality", choices=QUALITIES, default="high")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return, for each number of ranks and each link, the choice and the best method.

    Also the best method of each smaller number of ranks.
    """
    spec = read_table()[arguments.model]
    work = _work(spec, arguments)
    cases = []
    for ranks in map(int, arguments.ranks.split(",")):
        candidates = list_candidates(spec, {}, ranks, is_guided=work.halves == 2, has_caches=False)
        for gbps in map(float, arguments.link_gbps.split(",")):
            link = Link(
                latency_s=arguments.latency_us * 1e-6,
                bytes_per_s=gbps * 1e9 / 8,
                hides=DEVICES["gpu"].link.hides,
            )
            memory_bytes = None if arguments.memory_gb is None else int(arguments.memory_gb * 1e9)
            rows = rank(
                candidates,
                Measured(work=work, link=link, memory_bytes=memory_bytes),
                quality=arguments.quality,
                image=Image(num_steps=spec.num_inference_steps),
            )
            best = {
                size: found
                for size in range(1, ranks + 1)
                if (found := choose(rows, ranks=size)) is not None
            }
            chosen = choose(rows)
            cases.append(
                {
                    "ranks": ranks,
                    "link_gbps": gbps,
                    "choice": chosen.candidate.name if chosen is not None else None,
                    "best": {
                        size: _facts(row, work, spec.num_inference_steps)
                        for size, row in best.items()
                    },
                    "table": [row.facts() for row in rows],
                }
            )
    return {
        "model": arguments.model,
        "side": arguments.side,
        "quality": arguments.quality,
        "one_rank_step_s": work.step_s,
        "cases": cases,
    }


def _work(spec: ModelSpec, arguments: argparse.Namespace) -> Work:
    device = Device(operations_per_s=arguments.tflops * 1e12, link=DEVICES["gpu"].link)
    size = {"height": arguments.side, "width": arguments.side}
    work = estimate_config(
        **PUBLISHED[arguments.model],
        **size,
        halves=halves_of(spec),
        element_bytes=ELEMENT_BYTES["fp16"],
        device=device,
    )
    return work if arguments.step_s is None else replace(work, step_s=arguments.step_s)


def _facts(row: Row, work: Work, num_steps: int) -> dict[str, Any]:
    return {
        "method": row.candidate.name,
        "quality": row.candidate.quality,
        "step_s": round(row.step_s, 5),
        "image_s": round(row.image_s, 3),
        "speedup": round(work.step_s * num_steps / row.image_s, 2),
        "sent_mb": round(row.estimate.sent_bytes / 1e6, 1),
        "memory_gb": round(row.estimate.memory_bytes / 1e9, 1),
    }


def _table(result: dict[str, Any]) -> list[str]:
    title = (
        f"{result['model']}, {result['side']} x {result['side']} pixels, "
        f"--quality={result['quality']}"
    )
    lines = [
        f"{title}, {result['one_rank_step_s']:.3f} s a step on one rank",
        "",
        "| ranks | Gbit/s | quickest method | s/image | times one rank | MB sent per step and rank "
        "| GB per rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for size, best in case["best"].items():
            if size == case["ranks"] or best["method"] == case["choice"]:
                note = " (chosen)" if best["method"] == case["choice"] else ""
                figures = (
                    f"{best['image_s']:.2f} | {best['speedup']:.2f} | {best['sent_mb']:.0f} "
                    f"| {best['memory_gb']:.1f}"
                )
                lines.append(
                    f"| {size} of {case['ranks']} | {case['link_gbps']:g} | {best['method']}{note} "
                    f"| {figures} |"
                )
    return lines


if __name__ == "__main__":
    main()
