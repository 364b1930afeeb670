"""How the codec tests catch a refusal."""

import time
from collections.abc import Callable

import pytest

from backends.errors import RequestError


def refusal(decode: Callable[..., object], value: object, **options: object) -> str:
    """The message of the refusal; fails where there is none, or where it took much computing."""
    start = time.thread_time()
    with pytest.raises(RequestError) as caught:
        decode(value, field="latent", **options)
    assert caught.value.field == "latent"
    assert time.thread_time() - start < 5
    message = str(caught.value)
    assert message.startswith("latent: ")
    assert "Send" in message
    assert len(message) < 700
    return message
