"""Time of one step by class of operator (torch's profiler), and CPU time of other threads."""

import time
from collections import defaultdict
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

CLASSES = (
    ("attention", ("scaled_dot_product", "_flash_attention")),
    ("convolution", ("conv",)),
    ("linear", ("addmm", "aten::mm", "aten::bmm", "aten::linear", "gelu")),
    ("norm", ("norm", "var_mean", "rsqrt")),
    ("exchange", ("c10d", "gloo")),
    (
        "copies",
        ("copy_", "aten::cat", "aten::stack", "aten::clone", "aten::contiguous", "aten::fill_"),
    ),
)
"""Class -> parts of the operator names in it. The first match counts."""


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Run `step` and return milliseconds: of the main thread by class, and CPU time by thread.

    A class that waits includes its waiting time.
    """
    threads_before, main_before = time.process_time(), time.thread_time()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
        main_ms = 1e3 * (time.thread_time() - main_before)
        threads_ms = 1e3 * (time.process_time() - threads_before)
    result: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        result[_class_of(event.key)] += event.self_cpu_time_total / 1e3
    result |= {"main_thread_cpu": main_ms, "other_threads_cpu": threads_ms - main_ms}
    return {name: round(value, 1) for name, value in result.items()}


def _class_of(operator: str) -> str:
    return next(
        (name for name, parts in CLASSES if any(part in operator for part in parts)), "other"
    )
