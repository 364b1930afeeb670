"""Which launch arguments a workflow may give to a host.

Workflows come from strangers. They may not open the host to other machines, choose its key, or name
folders that requests can read or write.
"""

import re
import shlex
from collections.abc import Iterable

from diffusion_client import HostError

REFUSED = re.compile(
    r"host|port|api_keys?|share_jobs|config|\w*_dirs?|deployments|engine|ray_address|rdzv_\w+|nnodes"
    r"|node_rank|public_url|allowed_hosts|allowed_origins|trusted_proxies"
)


def read_arguments(text: str) -> tuple[str, ...]:
    """The text as a list. HostError for an argument that a workflow may not give."""
    try:
        tokens = tuple(shlex.split(text))
    except ValueError as error:
        raise HostError(
            f"arguments={text!r} cannot be read: {error}. Close each quotation mark.", status=400
        ) from error
    if tokens and not tokens[0].startswith("--"):
        raise HostError(
            f"arguments: {tokens[0]!r} is no argument. Begin each one with --, such as "
            "--type=sdxl.",
            status=400,
        )
    for name in _names(tokens):
        if REFUSED.fullmatch(name):
            raise HostError(
                f"arguments: --{name} is not allowed in a workflow. Leave it out, or start the "
                "host by hand and give its address.",
                status=400,
            )
    return tokens


def _names(tokens: Iterable[str]) -> Iterable[str]:
    """In the launcher's spelling: '-' equals '_' in names."""
    for token in tokens:
        if token.startswith("--"):
            yield token[2:].partition("=")[0].replace("-", "_")
