"""Which failures are worth a second attempt."""

import pytest
import torch

from backends.errors import PlanError, RequestError
from hosts.ranks.commands import Failure


@pytest.mark.parametrize(
    ("error", "is_chance"),
    [
        (ArithmeticError("a fault"), True),
        (RuntimeError("Connection closed by peer"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RequestError("no", field="steps"), False),
        (PlanError("no"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_nobody_caused_is_tried_again_and_what_would_stay_the_same_is_not(error, is_chance):
    assert Failure.of(error, rank=1).is_retryable is is_chance
