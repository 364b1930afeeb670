"""Every dialect that a host speaks beside its own."""

from flask import Flask

from hosts.compat import routes, v2_routes
from hosts.dialects import a1111, openai
from hosts.http.app import Host, create_app
from hosts.http.dialect import Dialect

EVERYWHERE = (openai.DIALECT, a1111.DIALECT, routes.DIALECT)


def application(host: Host) -> Flask:
    """Return the WSGI application of rank 0, with every dialect."""
    v2: tuple[Dialect, ...] = (v2_routes.DIALECT,) if host.control is not None else ()
    return create_app(host, (*EVERYWHERE, *v2))
