"""Logging of one rank: every line carries the rank; followers speak from WARNING up."""

import logging
import sys


def configure(*, rank: int, level: int = logging.INFO) -> None:
    """Set up the root logger of this process. A closed pipe at the other end must neither stop nor block the host."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank{rank} %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else logging.WARNING)
    for noisy in ("diffusers", "transformers", "httpx", "urllib3", "PIL", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
