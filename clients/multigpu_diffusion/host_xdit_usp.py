"""A host with the xdit backend, which the existing clients start by path with torchrun.

They use it for models that xDiT runs with sequence parallelism only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("xdit")
