"""For hosts started by a test with this folder on PYTHONPATH: raises, or hangs, in chosen places on
chosen ranks.

Python imports this module in every process it starts. Nothing in the product knows of it. The file
FAULT_FILE names holds lines "RANK PLACE"; each is taken out when it strikes, so it strikes once.

Hosts run as where the extra `options` is not installed: importing bitsandbytes brings torch's
compiler along, 2 CPU seconds per rank.
"""

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
import threading
from pathlib import Path

PLACES = {
    # in the middle of a step: the other ranks wait for this one's half of the noise
    "denoiser": ("diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel", "forward"),
    # between the passes of a pipeline of stages, which wait for each other's tokens and predictions
    "block": ("diffusers.models.attention", "JointTransformerBlock", "forward"),
    # after the last collective of the image
    "decode": ("backends.generation.latents", None, "decode"),
    # in native code: no exception, the process is gone
    "crash": ("diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel", "forward"),
    # for ever, while all threads of the rank go on
    "hang": ("diffusers.schedulers.scheduling_euler_discrete", "EulerDiscreteScheduler", "step"),
}


def strike(place):
    path = Path(os.environ["FAULT_FILE"])
    line = f"{os.environ['RANK']} {place}"
    lines = path.read_text().splitlines() if path.exists() else []
    if line in lines:
        lines.remove(line)
        path.write_text("\n".join(lines))
        if place == "hang":
            threading.Event().wait()
        if place == "crash":
            ctypes.string_at(0)
        raise ArithmeticError(f"a fault of the test in {place}")


def wrap(owner, name, place):
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        strike(place)
        return inner(*args, **kwargs)

    outer.__wrapped__ = inner  # diffusers reads signatures
    setattr(owner, name, outer)


class Finder(importlib.abc.MetaPathFinder):
    """Lets the usual finders find, and wraps what a PLACES module has defined."""

    def find_spec(self, name, path, target=None):
        here = [
            (place, owner, attribute)
            for place, (module, owner, attribute) in PLACES.items()
            if module == name
        ]
        if not here:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for place, owner, attribute in here:
                wrap(getattr(module, owner) if owner else module, attribute, place)

        spec.loader.exec_module = exec_module
        return spec


sys.modules["bitsandbytes"] = None
if "FAULT_FILE" in os.environ and {"RANK", "DIFFUSION_SPARE_RANK"} & set(os.environ):
    sys.meta_path.insert(0, Finder())
