"""The time of jobs. Imports nothing of ours."""

import time

_START = time.time() - time.monotonic()


def now() -> float:
    """Return the seconds since 1970 by a clock that agreed with the machine's when this process
    started, and never jumps.

    The machine's clock may be set at any time. A jump would make jobs late, or forget them.
    """
    return _START + time.monotonic()
