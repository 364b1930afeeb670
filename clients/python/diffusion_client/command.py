"""diffusion-launcher generate "a red circle" --url http://127.0.0.1:6000 --out circle.png"""

import argparse
import sys
from pathlib import Path

from diffusion_client import PATIENCE_S, Client, HostError, Job, JobState

EXIT_USER_ERROR = 2
BAR_WIDTH = 30


def main(argv: list[str]) -> int:
    """Return 0 once the file is written, or 2 with one line if the host refuses or does not
    answer.
    """
    options = _parser().parse_args(argv)
    given = {
        name: value
        for name, value in vars(options).items()
        if name not in ("url", "out", "api_key", "patience", "quiet") and value is not None
    }
    job: Job | None = None
    try:
        client = Client(options.url, api_key=options.api_key, patience_s=options.patience)
        job = client.submit(**given)
        for state in job.follow():
            _show(state, quiet=options.quiet)
        job.wait()
        options.out.write_bytes(job.result())
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if job is not None:
            _cancel(job)
        return 130
    print(
        f"{options.out} (seed {job.state.seed}, {job.state.seconds:.1f} s, {job.state.exactness})"
    )
    for note in job.state.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusion-launcher generate", description="One image or video from a host that runs."
    )
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:6000", help="of the host")
    parser.add_argument("--out", type=Path, default=Path("image.png"), help="file to write")
    parser.add_argument("--api_key", help="if the host wants one")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        help="seconds to wait for a host that restarts",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--negative_prompt")
    for name in ("seed", "num_inference_steps", "height", "width", "num_frames"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--scheduler")
    parser.add_argument(
        "--quality", choices=("exact", "high", "fast"), help="how close to the image of one GPU"
    )
    return parser


def _cancel(job: Job) -> None:
    try:
        job.cancel()
    except HostError as error:
        print(f"error: job {job.id} could not be cancelled: {error}", file=sys.stderr)


def _show(state: JobState, *, quiet: bool) -> None:
    """Show a progress bar on the terminal's stderr."""
    if quiet or not sys.stderr.isatty():
        return
    filled = BAR_WIDTH * state.step // state.steps if state.steps else 0
    text = (
        f"waiting, {state.position} before it"
        if state.state == "queued"
        else f"step {state.step} of {state.steps or '?'}"
    )
    sys.stderr.write(
        f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {text:30}"
        + ("\n" if state.is_over else "")
    )
    sys.stderr.flush()
