"""The keys that clients may bring. Pure Python."""

import binascii
import hashlib
import logging
import os
import threading
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hosts.launch.option import read_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, and what is derived from it. Equal keys own the same jobs, whatever their names."""

    name: str
    """Its name in --api_keys; empty for --api_key."""
    secret: str = field(repr=False)

    @property
    def owner(self) -> str:
        """What the job store knows of it."""
        return self.derived("owners").hex()

    def derived(self, purpose: str) -> bytes:
        """Return a key for this purpose.

        It is slow to derive. Otherwise the derived key, or a signature made with it, would be
        enough to test guesses of the secret quickly.
        """
        return _derived(self.secret, purpose)


@cache
def _derived(secret: str, purpose: str) -> bytes:
    salt = f"{purpose} of diffusion-launcher".encode()
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1)


class Keys:
    """The key of --api_key and those of --api_keys, whose file is read again when it changes."""

    def __init__(self, api_key: str | None, api_keys: str | None) -> None:
        """api_keys: path of the file. ValueError if it holds no keys."""
        self._lock = threading.Lock()
        self._own = Key(name="", secret=api_key) if api_key is not None else None
        self._file = Path(api_keys) if api_keys is not None else None
        self._seen = self._stamp()
        self._by_name: Mapping[str, Key] = {}
        self._by_digest: Mapping[bytes, Key] = {}
        self._hold(read_keys(self._file) if self._file is not None else {})

    @property
    def are_required(self) -> bool:
        return self._own is not None or self._file is not None

    def find(self, authorization: str) -> Key | None:
        """Return the key in an Authorization header, or None if there is none that is known."""
        self._refresh()
        # by digest: the time that a look-up takes says nothing about the keys
        return self._by_digest.get(_digest(key_in(authorization)))

    def named(self, name: str) -> Key | None:
        self._refresh()
        return self._by_name.get(name)

    def admits(self, authorization: str) -> bool:
        """Whether a client with this Authorization header may send a body."""
        return not self.are_required or self.find(authorization) is not None

    def _refresh(self) -> None:
        """Read the file if it has changed. A wrong one changes nothing."""
        if self._file is None or (stamp := self._stamp()) == self._seen:
            return
        with self._lock:
            if stamp == self._seen:
                return
            self._seen = stamp
            try:
                self._hold(read_keys(self._file))
            except ValueError as error:
                logger.error("--api_keys=%s keeps its last keys: %s", self._file, error)
                return
        logger.info("--api_keys=%s was read again: %s", self._file, ", ".join(self._by_name))

    def _stamp(self) -> tuple[int, ...]:
        """Return what tells one version of the file from the next; empty if there is no file."""
        try:
            found = os.stat(self._file) if self._file is not None else None
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else ()

    def _hold(self, named: Mapping[str, str]) -> None:
        keys = [Key(name=name, secret=secret) for name, secret in named.items()]
        keys += [self._own] if self._own is not None else []
        self._by_name = {key.name: key for key in keys}
        self._by_digest = {_digest(key.secret): key for key in keys}


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def key_in(authorization: str) -> str:
    """Return the key of an Authorization header: a bearer token or a Basic password."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return b64decode(given.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
