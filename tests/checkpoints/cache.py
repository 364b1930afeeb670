"""Where built checkpoints are kept between tests and runs. Imports no torch."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "peft", "safetensors")


def cached(name: str, recipe: dict, build: Callable[[Path], None]) -> Path:
    """Return the folder of `name` built after `recipe`; call `build(folder)` on an empty folder if
    it is not there yet.

    recipe: everything the content depends on, as JSON types; library versions and the source of
    this package are added.
    Safe for parallel processes: each builds in a folder of its own and renames it; the first to
    finish wins, contents are equal.
    """
    folder = (
        _root() / f"{name}-{_digest(json.dumps([name, recipe], sort_keys=True), _surroundings())}"
    )
    if folder.is_dir():
        return folder
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        build(draft)
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster and its folder is the same
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _root() -> Path:
    """The cache folder of this user. Refuses one that somebody else owns: its files would be
    loaded.
    """
    root = Path(tempfile.gettempdir()) / f"tiny-diffusion-checkpoints-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(
            f"{root} belongs to user id {root.stat().st_uid}, not to this one. Remove it, or set "
            "TMPDIR to another folder."
        )
    return root


@cache
def _surroundings() -> str:
    """Versions of the libraries and the source of this package: what decides a checkpoint besides
    its recipe.
    """
    versions = [f"{library} {version(library)}" for library in LIBRARIES]
    sources = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return _digest(*versions, *sources)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
