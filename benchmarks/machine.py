"""The machine's state during a measurement: CPU time of this process and others, peak memory.
Linux.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall and CPU seconds since `start`. `busy_s` is the CPU time of all processes of the
    machine.
    """

    wall_s: float
    cpu_s: float
    busy_s: float

    @classmethod
    def now(cls) -> "Clock":
        fields = [
            int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        ]
        idle = fields[3] + fields[4]
        return cls(time.perf_counter(), time.process_time(), (sum(fields) - idle) / TICKS)

    def since(self, start: "Clock") -> "Clock":
        return Clock(
            self.wall_s - start.wall_s, self.cpu_s - start.cpu_s, self.busy_s - start.busy_s
        )


def reset_peak_memory() -> None:
    """Reset the peak.

    This needs the right to write clear_refs; without it peaks only grow.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_mb() -> float:
    """Return the peak resident memory since the last reset, in MB of 10^6 bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return round(int(match[1]) * 1024 / 1e6, 1) if match else 0.0
