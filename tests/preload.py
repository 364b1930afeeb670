"""Imported once by the fork server, so that rank processes start with the heavy modules loaded.
Touches no thread pool.
"""

import gc
import importlib

import diffusers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from backends.generation.schedulers import SCHEDULERS
from backends.model_table import read_table

for name in (
    "backends.asyncdiff.backend",
    "backends.distrifuser.backend",
    "backends.generation.pipeline",
    "backends.xdit.backend",
    "diffusers.guiders",
    "pytest",
):
    importlib.import_module(name)
for facts in SCHEDULERS.values():
    getattr(importlib.import_module(facts.module), facts.class_name)
for spec in read_table().values():
    getattr(diffusers, spec.pipeline)
get_checkpoint_conversion_mapping(
    "clip"
)  # compiles a thousand patterns and keeps them: half of what a rank's first load would take
# a collection in a rank would otherwise write to the pages of everything above, and so copy them
gc.freeze()
