"""A host with the asyncdiff backend, which the existing clients start by path with torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("asyncdiff")
