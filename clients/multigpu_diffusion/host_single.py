"""A host on one device that waits for its pipeline.

Clients of the v2 protocol start it by path.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hosts.compat.host import serve

if __name__ == "__main__":
    serve("single")
