"""Finds the pipeline tests of a diffusers checkout and builds what they describe."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import tests
from backends.loading.processors import load_processor, wants_videos
from tests.checkpoints.cache import cached
from tests.checkpoints.upstream.hub import stand_in_hub

VARIABLE = "DIFFUSERS_TESTS"
"""Environment variable with the folder `tests` of a checkout of diffusers."""


def _folder() -> Path | None:
    """Return the folder `tests` of a diffusers checkout; None if none was given."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else None


@cache
def known() -> dict[str, tuple[str, str]]:
    """Return pipeline class -> the module and class of its test, as far as the sources name them.

    Of several tests of one class the shortest file name comes first: the plain one.
    """
    root = _folder()
    found: dict[str, tuple[str, str]] = {}
    if root is None:
        return found
    files = sorted((root / "pipelines").glob("**/test_*.py"), key=lambda file: len(file.name))
    for file in files:
        text = file.read_text("utf-8")
        for name, body in re.findall(r"^class (\w+)(.*?)(?=^class |\Z)", text, re.M | re.S):
            made = re.search(r"^    pipeline_class = (\w+)", body, re.M)
            if made and "def get_dummy_components" in body:
                wrapped = re.search(rf"^class {made.group(1)}\((\w+Pipeline)\)", text, re.M)
                module = ".".join(file.relative_to(root).with_suffix("").parts)
                pipeline = (wrapped or made).group(1)
                found.setdefault(pipeline, (module, name))
    return found


def checkpoint(name: str) -> Path:
    """Return the folder of a checkpoint of this pipeline class. LookupError if no test has one."""
    if name not in known():
        raise LookupError(f"no pipeline test of {name}")
    file = (_folder() / known()[name][0].replace(".", "/")).with_suffix(".py")
    own = Path(__file__).read_text("utf-8")
    recipe = {"test": file.read_text("utf-8"), "hub": stand_in_hub().name, "source": own}
    return cached(f"upstream-{name}", recipe, lambda folder: _build(name, folder))


def inputs(name: str) -> dict[str, Any]:
    """Return the arguments of the call in the test."""
    with _surroundings():
        asked = _test_of(name).get_dummy_inputs
        return asked("cpu") if inspect.signature(asked).parameters else asked()


def _build(name: str, folder: Path) -> None:
    import diffusers
    import torch

    from tests.checkpoints.saving import save

    with _surroundings(), torch.random.fork_rng(devices=[]), redirect_stdout(sys.stderr):
        torch.manual_seed(0)
        components = _test_of(name).get_dummy_components()
        for component in components.values():
            if getattr(component, "video_processor", "") is None:
                component.save_pretrained = partial(_save_processor, component)
        _fit_processor(components)
        save(getattr(diffusers, name)(**components), folder)


def _fit_processor(components: dict[str, Any]) -> None:
    """Let images get the size that the encoder takes. Tests bring it themselves, as tensors."""
    config = getattr(components.get("image_encoder"), "config", None)
    side = getattr(config, "image_size", None)
    for name in ("image_processor", "feature_extractor"):
        crop = getattr(components.get(name), "crop_size", None)
        if side and crop and crop["height"] != side:
            components[name].crop_size = {"height": side, "width": side}
            components[name].size = {"shortest_edge": side}


def _save_processor(processor: Any, folder: str, **_: Any) -> None:
    """Save what a processor without videos has."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


@contextmanager
def _surroundings() -> Iterator[None]:
    """Let the names of small models on a hub mean folders: transformers takes a folder first.

    Processors that need torchvision are read as the product reads them.
    """
    from transformers import ProcessorMixin

    before, plain = Path.cwd(), vars(ProcessorMixin)["from_pretrained"]

    def from_pretrained(made: Any, path: str, **options: Any) -> Any:
        if wants_videos(made.__name__):
            return load_processor(Path(path), made.__name__)
        return plain.__func__(made, path, **options)

    os.chdir(stand_in_hub())
    ProcessorMixin.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        ProcessorMixin.from_pretrained = plain
        os.chdir(before)


def _test_of(name: str) -> Any:
    """Return the test of a pipeline class, or one derived from it if it is not whole itself."""
    module, class_name = known()[name]
    root = str(_folder())
    if root not in tests.__path__:
        tests.__path__.append(root)  # diffusers' tests name their package so too
    found = importlib.import_module(f"tests.{module}")
    plain = getattr(found, class_name)
    derived = [each for each in vars(found).values() if isinstance(each, type)]
    whole = [each for each in (plain, *derived) if issubclass(each, plain) and _is_whole(each)]
    return whole[0]()


def _is_whole(test: type) -> bool:
    parameters = inspect.signature(test.get_dummy_components).parameters
    return all(each.default is not each.empty for each in list(parameters.values())[1:])
