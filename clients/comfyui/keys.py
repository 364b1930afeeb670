"""The keys of hosts, from a file of this machine.

A workflow never holds a key, and a key goes only to the address beside which it stands.
"""

import os
from pathlib import Path

from diffusion_client import HostError

VARIABLE = "DIFFUSION_HOST_KEYS"
"""The environment variable that names the file."""
DEFAULT_FILE = "~/.config/diffusion-launcher/keys"


def key_of(address: str) -> str | None:
    """The key of the host there; None where the file or a line for it is missing."""
    file = Path(os.environ.get(VARIABLE) or DEFAULT_FILE).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        if os.environ.get(VARIABLE):
            raise _unreadable(file, error) from error
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    return _read(lines, file).get(address)


def _read(lines: list[str], file: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise HostError(
                f"line {number} of {file} has {len(words)} words. Write ADDRESS KEY, such as "
                "http://10.0.0.5:6000 followed by its key.",
                status=400,
            )
        found[words[0].rstrip("/")] = words[1]
    return found


def _unreadable(file: Path, error: Exception) -> HostError:
    return HostError(
        f"the file of keys {file} cannot be read: {error}. Correct it, or the environment "
        f"variable {VARIABLE}.",
        status=400,
    )
