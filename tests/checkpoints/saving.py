"""Saves what the builders made, whichever process they run in."""

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel


def save(thing: DiffusionPipeline | ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Write all of `thing` into `folder`, on any rank of a process group.

    transformers 5 writes on rank 0 only, and silently; here the rank that asks first builds for
    all, and a checkpoint without its text encoder would stay in the cache for everybody.
    """
    models = thing.components.values() if isinstance(thing, DiffusionPipeline) else [thing]
    for model in models:
        if isinstance(model, PreTrainedModel):
            model.should_save_on_this_rank = lambda is_main_process: is_main_process
        if model is not None and getattr(model, "video_processor", model) is None:
            # transformers' own way wants the part for videos, which needs torchvision
            model.save_pretrained = partial(_save_processor, model)
    thing.save_pretrained(folder)


def _save_processor(processor: Any, folder: str, **_: Any) -> None:
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
