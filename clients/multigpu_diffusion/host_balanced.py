"""Started by path by clients of the v2 protocol.

The same as host_single.py, because one process has one device here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("single")
