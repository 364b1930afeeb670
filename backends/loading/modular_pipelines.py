"""Modular pipelines of diffusers, with what the host asks of any pipeline."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers

from backends.files.modular import GUIDER

OVERLAY = "mask_overlay_kwargs"
"""Input of blocks that lay what was painted over the image around it."""


class _AsPipeline:
    """What a DiffusionPipeline has and a ModularPipeline lacks. A base before its class."""

    progress_bar = diffusers.DiffusionPipeline.progress_bar
    set_progress_bar_config = diffusers.DiffusionPipeline.set_progress_bar_config

    def __call__(self, guidance_scale: float | None = None, **inputs: Any) -> SimpleNamespace:
        """Return an object with a field for each output of the blocks."""
        if guidance_scale is not None and (guider := getattr(self, GUIDER, None)) is not None:
            self.register_components(**{GUIDER: guider.new(guidance_scale=guidance_scale)})
        elif guidance_scale is not None:
            inputs["guidance_scale"] = guidance_scale
        if inputs.get("mask_image") is not None and OVERLAY in self.blocks.input_names:
            inputs["output_type"] = "pil"  # other outputs cannot be laid over the image
        state = super().__call__(**inputs)
        return SimpleNamespace(**{name: state.get(name) for name in self.blocks.output_names})

    def register_modules(self, **modules: Any) -> None:
        self.register_components(**modules)

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: offloading is not available for these classes."""


def modular_from_folder(
    pipeline: type, folder: Path, given: Mapping[str, Any], *, dtype: Mapping[str, Any], **how: Any
) -> Any:
    """Return the modular pipeline of this class with the components in the folder.

    given: components that are there already. how: arguments of each component's from_pretrained.
    Code in the folder is not run: the class is one of diffusers, and so are its blocks.
    """
    pipe = _with_pipeline_methods(pipeline)(
        pretrained_model_name_or_path=str(folder), local_files_only=True
    )
    for name in pipe.pretrained_component_names:
        if name in given or not (folder / name).is_dir():
            continue  # the folder lacks only what not every call needs, such as a ControlNet
        kind = {"dtype": dtype.get(name, dtype["default"]), **how}
        is_model = (folder / name / "config.json").is_file()
        pipe.register_components(
            **{name: pipe.get_component_spec(name).load(**(kind if is_model else {}))}
        )
    pipe.register_components(**given)
    for block in _blocks(pipe._blocks):  # `blocks` is a copy
        if hasattr(block, "progress_bar"):
            # looked up at each call, because the host replaces the pipeline's own
            block.progress_bar = lambda *args, **kwargs: pipe.progress_bar(*args, **kwargs)
    return pipe


@lru_cache(maxsize=8)
def _with_pipeline_methods(pipeline: type) -> Any:
    return type(pipeline.__name__, (_AsPipeline, pipeline), {})


def _blocks(block: Any) -> Iterator[Any]:
    yield block
    for part in getattr(block, "sub_blocks", {}).values():
        yield from _blocks(part)
