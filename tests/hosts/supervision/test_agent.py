"""torchelastic's agent over real processes: how often it starts a set again, and what it says when
it gives up.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from hosts.supervision.exit_reports import RankNotes

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import os, time
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if attempt == 1:
    open({served!r}, "w").close()
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(100)
"""


def test_restarts_are_counted_from_the_last_image_and_the_reason_for_giving_up_is_told(tmp_path):
    notes, fatal, script = tmp_path / "notes", tmp_path / "fatal", tmp_path / "rank.py"
    notes.mkdir()
    served = RankNotes(notes, attempt=1)
    script.write_text(RANK.format(served=str(served._path("served"))))
    options = {"num_ranks": 2, "max_restarts": 1, "notes": str(notes), "fatal": str(fatal)}
    program = (
        "import sys; from hosts.supervision.agent import main; sys.exit(main(sys.argv[1:], "
        f"program=[{str(script)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 1, done.stderr
    assert not [*tmp_path.glob("torchelastic_*")]
    # started; again (1 in a row); served, then again (1 in a row); given up
    assert RankNotes(notes, attempt=2).exits()[1] == -9 and not RankNotes(notes, attempt=3).exits()
    assert fatal.read_text() == (
        "the ranks failed 2 times without a finished image in between (--max_restarts=1). "
        "The last time: rank 1 was killed by SIGKILL, which the kernel sends when memory runs out."
    )
