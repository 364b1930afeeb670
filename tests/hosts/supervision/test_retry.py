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


@pytest.mark.parametrize("take", [lambda: torch.empty(2**50), lambda: bytearray(2**60)])
def test_lack_of_main_memory_is_told_with_advice_and_not_tried_again(take):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        take()
    failure = Failure.of(caught.value, rank=1)
    assert "out of memory. Ask for a smaller image" in str(failure.as_error())
    assert not failure.is_retryable
