"""The sender of the current request: whose turn it takes, and which jobs are its own."""

import hashlib
import ipaddress

from flask import current_app, g, request

from hosts.http.identity.keys import Key


def client() -> str:
    """Return the client for fair sharing, rates and Idempotency-Keys: its address, with --api_key
    also its key, or its key of --api_keys alone, which belongs to one client.

    Whatever else a request says of itself does not count: it could say so each time anew.
    """
    address, key = _network_of(request.remote_addr or ""), _key()
    if key is None:
        return address
    return hashlib.sha256(f"{key.owner} {'' if key.name else address}".encode()).hexdigest()


def new_owner() -> str:
    """Return the owner of a job that this request makes; empty on a host without keys."""
    key = _key()
    return key.owner if key is not None else ""


def seen_owner() -> str | None:
    """Return whose jobs this request may see, follow, fetch and cancel; None for everybody's."""
    settings = current_app.extensions["host"].settings
    return None if settings.api_keys is None or settings.share_jobs else new_owner()


def _key() -> Key | None:
    """Return the key that the access checks have found."""
    return g.get("key")


def _network_of(address: str) -> str:
    """Return the address, or the first 64 bits of an IPv6 one, of which a client has many."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4 or found.ipv4_mapped is not None:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))
