"""The time of jobs. Imports nothing of ours."""

import time

_START = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970 by this process's own clock, which was right when it started and never
    jumps.

    The machine's may be set forward or back at any time: by that a job would be late, or wait, or
    be forgotten.
    """
    return _START + time.monotonic()
