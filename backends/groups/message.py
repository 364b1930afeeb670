"""Messages between ranks as bytes, signed, and complete before any of them is sent. Imports no
torch.
"""

import hashlib
import hmac
import pickle
from typing import Any

from backends.errors import UnsendableError

_SIGNATURE_BYTES = hashlib.sha256().digest_size


class _Secret:
    """What the ranks of this process's host have in common, and nobody else."""

    value = b""


def share_secret(secret: bytes) -> None:
    """Sign and check all messages of this process with a secret from now on.

    Without one they are signed with an empty secret, which detects accidents only.
    """
    _Secret.value = secret


def sign(data: bytes) -> bytes:
    """Return the signature of the data: 32 bytes."""
    return hmac.new(_Secret.value, data, hashlib.sha256).digest()


def pack(message: object) -> bytes:
    """Return the pickled message, signed. UnsendableError if it cannot be pickled."""
    try:
        data = pickle.dumps(message)
    except Exception as error:  # the values may raise anything
        raise UnsendableError(
            f"the request cannot be sent to the other ranks ({type(error).__name__}: {error}). "
            "Send plain values, not nested ones."
        ) from error
    return sign(data) + data


def unpack(message: bytes) -> Any:
    """Return a message that another rank of this host packed. RuntimeError for any other, before
    it is unpickled.
    """
    signature, data = message[:_SIGNATURE_BYTES], message[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, sign(data)):
        raise RuntimeError("a message is not from a rank of this host: its signature is wrong")
    return pickle.loads(data)  # noqa: S301  signed by a rank
