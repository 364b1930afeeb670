"""What is rehearsed on several GPUs. A feature that touches devices adds its case to
method_cases.py or option_cases.py; on one GPU, to one_rank_cases.py.
"""

from collections.abc import Iterator

from tests.rehearsal.case import PATCH, SEGMENTS, Ranks, stages
from tests.rehearsal.method_cases import METHODS
from tests.rehearsal.option_cases import OPTIONS

SHORT = (
    Ranks(label="patches", type="sdxl", backend="distrifuser", options=PATCH),
    Ranks(
        label="segments with sharded weights",
        type="sdxl",
        backend="asyncdiff",
        options={**SEGMENTS, "shard_weights": True},
    ),
    Ranks(label="stages", type="sd3", backend="xdit", options=stages(2, 3)),
)
"""In every run of the tests."""

LONG = (*METHODS, *OPTIONS)
"""All methods, and what goes through other code on the way to the device."""


FAILING_SHORT = (
    Ranks(label="patches under ddim", type="sd2", backend="distrifuser", options=PATCH),
    Ranks(
        label="decode of sdxl", type="sdxl", backend="distrifuser", options=PATCH, fails_in="vae"
    ),
)
"""In every run of the tests: the others wait between steps, where they learn of it by rank 0's word
too, and in a copy to the CPU, where only the alarm wakes them."""


def every_method() -> Iterator[Ranks]:
    """Each method once, of all that is rehearsed on two and three ranks. On four, with two axes,
    gloo would wait for itself: it carries the rehearsed messages, and its abort ends nothing.
    """
    seen = []
    for case in (*SHORT, *LONG):
        method = (
            *(case.backend, case.ranks, case.options, case.load),
            *(tuple(case.changes_to), case.team_size),
        )
        if case.ranks < 4 and "offload" not in case.load and method not in seen:
            seen.append(method)
            yield case


FAILING_LONG = (
    *every_method(),
    Ranks(label="patches under pndm", type="sd1", backend="distrifuser", options=PATCH),
    Ranks(
        label="step cache",
        type="flux",
        backend="xdit",
        options={"ulysses_degree": 2},
        feature="step_cache",
    ),
    Ranks(
        label="decode of flux",
        type="flux",
        backend="xdit",
        options={"ulysses_degree": 2},
        fails_in="vae",
    ),
)
"""One rank fails: wherever the others may wait then."""
