"""Loads the folder of a pipeline, with what diffusers and transformers cannot load themselves.

transformers wants torchvision for the videos of some processors, and pipelines of diffusers give
them texts and images only. It prepares images with PIL where torchvision is missing.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers

from backends.files.checkpoint import is_modular, read_index
from backends.files.component_classes import defining_module
from backends.loading.key_check import encoder_config
from backends.loading.modular_pipelines import modular_from_folder

VIDEOS = "video_processor"


def pipeline_from_folder(pipeline: Any, folder: Path, **arguments: Any) -> Any:
    """Return pipeline.from_pretrained(folder, **arguments), on a machine without torchvision too.

    diffusers compares the class of a component that it is given with the one that the folder names.
    Where transformers has none, a tokenizer takes its place afterwards.
    """
    index = read_index(folder)
    found = processors_without_torchvision(folder, index)
    if is_modular(folder):
        return modular_from_folder(pipeline, folder, found, **arguments)
    arguments = _left_out(index, pipeline) | arguments
    later = {name: each for name, each in found.items() if not _is_processor(each)}
    found |= sized_encoders(folder, index, arguments)
    with reachable(index):
        made = pipeline.from_pretrained(folder, **arguments, **(found | dict.fromkeys(later)))
    made.register_modules(**later)
    return made


def _left_out(index: Mapping[str, Any], pipeline: Any) -> dict[str, Any]:
    """Return component -> None, for those that the folder does without.

    diffusers writes them as [null, null], such as the T5 of Stable Diffusion 3, and loads such a
    folder only if it is told so once more.
    """
    names = inspect.signature(pipeline.__init__).parameters
    return {name: None for name in names if index.get(name) == [None, None]}


@contextmanager
def reachable(index: Mapping[str, Any]) -> Iterator[None]:
    """Let diffusers find the classes that an index names, where it no longer has these names.

    Published folders name some classes by the folder of a pipeline, such as
    ["unclip", "UnCLIPTextProjModel"], and diffusers moves old ones to `pipelines.deprecated`. It
    also saves classes under "diffusers" that it does not export.
    """
    with ExitStack() as stack:
        for entry in index.values():
            if isinstance(entry, list) and all(isinstance(part, str) for part in entry):
                stack.enter_context(_reachable(*entry))
        yield


@contextmanager
def _reachable(library: str, name: str) -> Iterator[None]:
    place = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, None)
    module = None
    if library != "transformers" and not hasattr(place, name):
        module = defining_module(name)
    if module is None:
        yield
        return
    found = importlib.import_module(module)
    if place is None:
        place, name, made = diffusers.pipelines, library, found
    else:
        made = getattr(found, name)
    setattr(place, name, made)
    try:
        yield
    finally:
        delattr(place, name)


def sized_encoders(
    folder: Path, index: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return component -> T5Gemma's encoder, in the size that its configuration has.

    diffusers takes the default size, of 2 billion parameters, if the configuration is that of the
    encoder alone, as its own save_pretrained writes it.
    """
    named = {name: arguments[name] for name in ("variant", "local_files_only") if name in arguments}
    dtypes = arguments.get("dtype", {})
    found = {}
    for component, entry in index.items():
        if entry == ["transformers", "T5GemmaEncoder"] and component not in arguments:
            made, place = transformers.T5GemmaEncoder, folder / component
            found[component] = made.from_pretrained(
                place,
                config=encoder_config(made, place),
                dtype=dtypes.get(component, dtypes.get("default")),
                **named,
            )
    return found


def processors_without_torchvision(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return component -> processor, for those that transformers cannot load on this machine.

    index: content of model_index.json. Empty if torchvision is installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    return {
        component: load_processor(folder / component, entry[1])
        for component, entry in index.items()
        if isinstance(entry, list) and entry[0] == "transformers" and wants_videos(entry[1])
    }


def wants_videos(name: str | None) -> bool:
    """Return whether a class of transformers is a processor that needs torchvision."""
    made = getattr(transformers, name, None) if name and name.endswith("Processor") else None
    if made is None:
        return False
    return _is_placeholder(made) or VIDEOS in _parts_of(made)


def _is_placeholder(made: Any) -> bool:
    """Return whether transformers has put another class in the place of one it cannot import."""
    return "torchvision" in (getattr(made, "_backends", None) or ())


def _is_processor(component: Any) -> bool:
    return isinstance(component, transformers.ProcessorMixin)


def _parts_of(made: Any) -> list[str]:
    return made.get_attributes() if hasattr(made, "get_attributes") else []


def load_processor(folder: Path, name: str) -> Any:
    """Return the processor without its part for videos, or its tokenizer if that is all there is.

    A tokenizer has the template of conversations, so it answers what a pipeline asks with texts.
    """
    made = getattr(transformers, name)
    if _is_placeholder(made):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    parts = {
        "tokenizer": transformers.AutoTokenizer,
        "image_processor": transformers.AutoImageProcessor,
    }
    found = {
        part: None if part == VIDEOS else parts[part].from_pretrained(folder, local_files_only=True)
        for part in _parts_of(made)
    }
    settings, _ = made.get_processor_dict(folder)
    return _without_videos(made)(**found, chat_template=settings.get("chat_template"))


@functools.cache
def _without_videos(made: Any) -> Any:
    """Return a class of this name that does without a processor of videos."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        is_left_out = argument_name == VIDEOS and argument is None
        return None if is_left_out else plain(self, argument_name, argument)

    plain = made.check_argument_for_proper_class
    names = {"__module__": made.__module__, "check_argument_for_proper_class": check}
    return type(made.__name__, (made,), names)
