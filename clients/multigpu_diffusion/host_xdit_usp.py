"""Started by torchrun, by path, from the existing clients, for models that xDiT runs by sequence
parallelism alone: the xdit backend.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("xdit")
