"""What the existing clients do with a host's bodies: base64 of a pickle, both ways, without any of
our code.
"""

import base64
import pickle
from typing import Any

FOUR_KEYS = {"message", "output", "latent", "is_image"}


def encode(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode("ascii")


def decode(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))


def assert_is_error(body: dict[str, Any]) -> str:
    """The four keys of an error, nothing in them but the message, which is returned."""
    assert set(body) == FOUR_KEYS, body
    assert body["output"] is None and body["latent"] is None and body["is_image"] is False
    assert isinstance(body["message"], str) and body["message"]
    return body["message"]
