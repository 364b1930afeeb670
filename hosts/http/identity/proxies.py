"""Requests as their clients sent them to the outermost trusted proxy."""

import ipaddress
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from hosts.launch.settings import Settings

FORWARDED = ("FOR", "PROTO", "HOST", "PREFIX")
"""The X-Forwarded headers that are read."""

logger = logging.getLogger(__name__)


class BehindProxies:
    """WSGI middleware: shows requests as their clients sent them to the outermost trusted proxy.

    X-Forwarded-For, -Proto, -Host and -Prefix are read from trusted addresses only. In each the
    last value counts, which the proxy itself has written. A path prefix, also that of --public_url,
    may be sent on or not.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], settings: Settings) -> None:
        self._app = app
        self._trusted = [ipaddress.ip_network(each) for each in settings.trusted_proxies or ()]
        self._prefix = urlsplit(settings.public_url or "").path
        self._has_warned = False

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        sender = environ.get("REMOTE_ADDR", "")
        sent = {
            name: environ.pop(f"HTTP_X_FORWARDED_{name}")
            for name in FORWARDED
            if f"HTTP_X_FORWARDED_{name}" in environ
        }
        if sent and not self._is_trusted(sender):
            self._warn(sender, sent)
            sent = {}
        last = {name: value.rpartition(",")[2].strip() for name, value in sent.items()}
        if last.get("PROTO") in ("http", "https"):
            environ["wsgi.url_scheme"] = last["PROTO"]
        if last.get("HOST"):
            environ["HTTP_HOST"] = last["HOST"]
        if "FOR" in sent:
            environ["REMOTE_ADDR"] = self._client(sender, sent["FOR"])
        _move_prefix(environ, last.get("PREFIX", "").rstrip("/") or self._prefix)
        return self._app(environ, start)

    def _is_trusted(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self._trusted)

    def _client(self, sender: str, forwarded_for: str) -> str:
        """Return the last address that is not a trusted proxy's: it was seen by one that is."""
        client = sender
        for address in reversed([each.strip() for each in forwarded_for.split(",")]):
            if not self._is_trusted(client):
                break
            client = address
        return client

    def _warn(self, sender: str, sent: Iterable[str]) -> None:
        if not self._has_warned:
            names = ", ".join(f"X-Forwarded-{name.title()}" for name in sent)
            logger.warning(
                "a request from %s has %s, which is not read. If that is your proxy, start the "
                "host with --trusted_proxies=%s",
                sender,
                names,
                sender,
            )
        self._has_warned = True


def _move_prefix(environ: dict[str, Any], prefix: str) -> None:
    """Make the prefix part of the application's root, and take it off the path if it is there."""
    if not re.fullmatch(r"(/[\w.~-]+)+", prefix, re.ASCII) or environ.get("SCRIPT_NAME"):
        return
    environ["SCRIPT_NAME"] = prefix
    path = environ.get("PATH_INFO", "")
    if path == prefix or path.startswith(f"{prefix}/"):
        environ["PATH_INFO"] = path[len(prefix) :] or "/"
