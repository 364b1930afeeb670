"""Train the demo model: `python -m demo.train --minutes 120 --work DIR --out demo/checkpoint`.

Stages run in this order: data (cached latents), unet (UNet and text encoders), decoder and encoder
(VAE), assemble (the diffusers folder). `--stage` runs one of them. Every stage continues from what
`--work` already holds. Importing this module and `--help` need no torch.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

STAGES = ("data", "unet", "decoder", "encoder", "assemble")
SHARE_OF_TIME = {"unet": 0.85, "decoder": 0.12, "encoder": 0.03}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description="Train the demo model on the CPU."
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=120,
        help="wall time for unet, decoder and encoder together",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="checkpoint folder to write; replaced when complete"
    )
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for latents and training states; restarts continue from it",
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="earlier checkpoint whose weights are the starting point (default: from scratch)",
    )
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument(
        "--thousands", type=int, default=30, help="training images of each size, in thousands"
    )
    parser.add_argument(
        "--large-share", type=float, default=0.0, help="share of the unet's time on 256 px images"
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=(128, 256),
        default=128,
        help="default height and width of the checkpoint",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    return parser


def _data(args: argparse.Namespace) -> None:
    from demo.train_unet import write_latents

    for size in (128, 256) if args.large_share else (128,):
        write_latents(args.work, size=size, chunks=args.thousands, seed=args.seed)


def _unet(args: argparse.Namespace) -> None:
    from demo.train_unet import Plan, train_unet

    seconds = 60 * args.minutes * SHARE_OF_TIME["unet"]
    train_unet(
        Plan(
            seconds=seconds,
            folder=args.work,
            seed=args.seed,
            start=args.start,
            large_share=args.large_share,
        )
    )


def _vae(half: str) -> Callable[[argparse.Namespace], None]:
    def train(args: argparse.Namespace) -> None:
        from demo.train_vae import Plan, train_vae

        start = args.start / "vae" if args.start else None
        seconds = 60 * args.minutes * SHARE_OF_TIME[half]
        train_vae(
            Plan(
                half=half,
                seconds=seconds,
                folder=args.work / "vae",
                start=start,
                seed=args.seed + 1,
            )
        )

    return train


def _assemble(args: argparse.Namespace) -> None:
    from demo.assemble import assemble

    assemble(args.work, args.out, size=args.size)


_RUN = {
    "data": _data,
    "unet": _unet,
    "decoder": _vae("decoder"),
    "encoder": _vae("encoder"),
    "assemble": _assemble,
}


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    import torch

    torch.set_num_threads(args.threads)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        _RUN[stage](args)


if __name__ == "__main__":
    main()
