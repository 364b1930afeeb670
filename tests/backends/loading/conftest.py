"""Pipelines that the tests of a file share."""

import pytest

from backends.generation.pipeline import LoadedPipeline
from tests.backends.features import TABLE, loaded


@pytest.fixture(scope="module")
def pipes():
    """name -> its pipeline; one is kept at a time."""
    kept: dict[str, LoadedPipeline] = {}

    def of(name: str) -> LoadedPipeline:
        if name not in kept:
            kept.clear()
            kept[name] = loaded(TABLE[name])
        return kept[name]

    return of
