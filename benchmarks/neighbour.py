"""One rank alone, in a process of its own that makes a step when it is asked to: what a step of
several ranks is compared with.

A shared machine's speed changes by a tenth within a minute. So the single rank's step is not taken
from a loop of its own, but made between the steps of the others, which wait meanwhile and use no
CPU.
"""

import statistics
from multiprocessing.connection import Connection

import torch

from benchmarks.machine import Clock
from benchmarks.models import SUBJECTS

BLOCK = 5
"""Steps that follow one another between two of the neighbour's. The first is not counted: messages
that displaced methods leave under way have had the neighbour's time to arrive, and a pipeline of
stages has to fill."""


def serve(model: str, connection: Connection) -> None:
    """The process: a step for each message, answered with its (wall, CPU) seconds; until None."""
    torch.set_num_threads(1)
    subject = SUBJECTS[model]()
    scheduler = subject.pipe.scheduler
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[0]
    with torch.no_grad():
        subject.predict(subject.sample, timestep)  # the first one pays for first-use costs
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
    """Rank 0's end: asks for steps between the others' and keeps what they took."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._alone: list[tuple[float, float]] = []

    def step(self) -> None:
        self._connection.send("step")
        self._alone.append(self._connection.recv())

    def ratios(self, steps: list[tuple[float, float]]) -> dict[str, float]:
        """The neighbour's seconds over the ranks' own, by wall and by CPU: medians over the blocks.

        steps: (wall, CPU) seconds of each step of whole blocks, with a step of the neighbour before
        each block and after the last.
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
