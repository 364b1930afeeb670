"""Started by Python, by path, by clients of the v2 protocol: a host on one device, which waits for
its pipeline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("single")
