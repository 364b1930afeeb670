"""For hosts started by a test with this folder on PYTHONPATH: the driver shows two GPUs to
launcher, agent and ranks. They are rehearsed, and each rank notes its environment, if
REHEARSED_NOTES names a folder for that; else torch can use none.

Python imports this module in every process it starts. Nothing in the product knows of it.
"""

import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
from pathlib import Path

NUM_GPUS = 2
MEMORY = 24 << 30
ANSWERS = {
    "count_present": NUM_GPUS,
    "lowest_capability": (9, 0),
    "smallest_memory": MEMORY,
    "driver_version": "580.65",
}
"""Of the driver's library, by the functions of hosts/launch/gpus.py that ask it."""
HANG_S = 15.0
NOTES = "REHEARSED_NOTES"


def answer(module):
    for name, value in ANSWERS.items():
        setattr(module, name, lambda value=value: value)


def rehearse(module):
    inner = module.RankProcess.run

    def run(self, *args):
        from tests.rehearsal.rehearsal import Rehearsal

        note = Path(os.environ[NOTES], f"{self.place.rank}-{os.getpid()}.json")
        note.write_text(json.dumps(dict(os.environ)))
        with Rehearsal(num_devices=NUM_GPUS, index=self.place.local_rank, hang_s=HANG_S):
            return inner(self, *args)

    module.RankProcess.run = run


CHANGES = {"hosts.launch.gpus": answer}
if NOTES in os.environ:
    CHANGES["hosts.ranks.rank_process"] = rehearse


class Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finders find, and changes what a module of CHANGES has defined."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
runpy.run_path(str(Path(__file__).parents[2] / "hosts" / "faults" / "sitecustomize.py"))
