"""torchelastic's agent over real processes: how often it starts a set again, and what it says when
it gives up.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hosts.supervision import agent
from hosts.supervision.exit_reports import RankNotes
from hosts.supervision.spares import Spares, start_rank

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import os, time
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if attempt == 1:
    with open({served!r}, "w") as file:
        file.write(str(time.monotonic()))
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
        "import os, sys; from hosts.supervision.agent import main; sys.exit(main(sys.argv[1:], "
        f"program=[{str(script)!r}], environ=os.environ))"
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


def test_clock_that_is_set_back_does_not_hide_how_long_ranks_have_served(tmp_path, monkeypatch):
    """Else three restarts within a day would end the launcher."""
    notes = RankNotes(tmp_path, attempt=0)
    assert not agent._has_proved_itself(notes)
    monkeypatch.setattr(agent, "PROVED_AFTER_S", 0.0)
    notes.mark("ready")
    wrong_s = time.time() - 86_400
    monkeypatch.setattr(time, "time", lambda: wrong_s)
    assert agent._has_proved_itself(notes)


SPARE_RANK = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from hosts.supervision import spares
early = "RANK" in os.environ
if spares.SPARE in os.environ:
    spares.wait_for_turn(os.environ, Path({notes!r}))
    sys.stdin.read()  # ends at once
with open("/proc/self/environ", "rb") as file:
    shown = [each.decode() for each in file.read().split(b"\\0")]
print(early, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], "wave" in sys.modules,
      "RANK=1" in shown and "LOCAL_RANK=1" in shown, spares.SPARE in os.environ, flush=True)
sys.exit(int(os.environ["RANK"]))
"""


@pytest.fixture
def spares(tmp_path):
    script = tmp_path / "rank.py"
    RankNotes(tmp_path, attempt=0).put_modules(["colorsys", "no.such.module", "wave"])
    script.write_text(SPARE_RANK.format(root=str(ROOT), notes=str(tmp_path)))
    made = Spares([sys.executable, str(script)])
    yield made
    made.stop()


def environment(attempt):
    own = {"RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    return {**os.environ, **own}


def test_spare_becomes_a_rank_that_others_find_and_has_imported_before(spares, capfd):
    spares.start({1: environment(3)})
    spare = next(iter(spares._waiting.values()))
    shown = psutil.Process(spare.pid)
    deadline = time.monotonic() + 60
    while shown.status() != psutil.STATUS_SLEEPING and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "RANK" not in shown.environ(), "a spare is no rank yet"
    spares.start({1: environment(3)})
    assert len(spares) == 1
    rank = spares.take(1, environment(4))
    assert rank is spare and rank.wait(60) == 1
    assert capfd.readouterr().out.split() == ["False", "1", "4", "True", "True", "False"]
    assert spares.take(1, environment(5)) is None


def test_spare_that_has_died_is_not_used_and_one_without_an_agent_ends(spares):
    spares.start({1: environment(0)})
    dead = next(iter(spares._waiting.values()))
    dead.kill()
    dead.wait()
    assert spares.take(1, environment(1)) is None
    lonely = start_rank(
        spares._command, environment(0) | {"DIFFUSION_SPARE_RANK": "1"}, stdin=subprocess.PIPE
    )
    lonely.stdin.close()
    assert lonely.wait(60) == 0
