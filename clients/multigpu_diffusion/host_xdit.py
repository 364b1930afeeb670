"""Started by torchrun, by path, from the existing clients: a host with the xdit backend."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("xdit")
