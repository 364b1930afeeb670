"""A single rank in a process of its own that runs a step on request, as the reference for others.

A shared machine's speed changes by a tenth within a minute. So the single rank's steps run between
those of the other ranks, which wait without using the CPU, instead of in a loop of their own.
"""

import statistics
from multiprocessing.connection import Connection

import torch

from benchmarks.machine import Clock
from benchmarks.models import SUBJECTS

BLOCK = 5
"""Consecutive steps between two reference steps. The first is not counted: pending messages of
displaced methods had the time of the reference step to arrive, and a pipeline of stages has to
fill.
"""


def serve(model: str, connection: Connection) -> None:
    """Run the process: one step per message, answered with its (wall, CPU) seconds. None ends
    it.
    """
    torch.set_num_threads(1)
    subject = SUBJECTS[model]()
    scheduler = subject.pipe.scheduler
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[0]
    with torch.no_grad():
        subject.predict(subject.sample, timestep)  # the first one includes first-use costs
        while connection.recv() is not None:
            start = Clock.now()
            scheduler.step(
                subject.predict(subject.sample, timestep),
                timestep,
                subject.sample,
                return_dict=False,
            )
            used = Clock.now().since(start)
            connection.send((used.wall_s, used.cpu_s))


class Neighbour:
    """Rank 0's end: requests steps between the others' and records their times."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._alone: list[tuple[float, float]] = []

    def step(self) -> None:
        self._connection.send("step")
        self._alone.append(self._connection.recv())

    def ratios(self, steps: list[tuple[float, float]]) -> dict[str, float]:
        """Return the reference seconds over the ranks' own, by wall and CPU: medians over the
        blocks.

        steps: (wall, CPU) seconds of each step of whole blocks, with a reference step before each
        block and after the last.
        """
        alone, self._alone = self._alone, []
        ratios = []
        for block, (before, after) in enumerate(zip(alone, alone[1:], strict=False)):
            counted = steps[block * BLOCK + 1 : (block + 1) * BLOCK]
            ratios.append(
                [
                    (before[what] + after[what])
                    / 2
                    * len(counted)
                    / sum(step[what] for step in counted)
                    for what in (0, 1)
                ]
            )
        wall, cpu = (round(statistics.median(values), 3) for values in zip(*ratios, strict=True))
        return {"step_ratio": wall, "cpu_ratio": cpu}
