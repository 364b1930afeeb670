"""The rows of the model table as parameters of a test."""

import pytest

from backends.model_table import read_table
from tests.checkpoints import NAMES

EVERY_TYPE = [
    name if name in NAMES else pytest.param(name, marks=pytest.mark.slow) for name in read_table()
]
"""Types that are built of their class's components run the code of the others: in the long tail."""
