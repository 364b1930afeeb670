"""Heartbeats between ranks: a rank that is lost, hangs or makes no progress ends all ranks, which
then restart.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from hosts.supervision.exit_reports import ExitReport
from hosts.supervision.parent_watch import EXIT_LOST_RANK, has_started, kill_rank
from hosts.supervision.progress import Activity

logger = logging.getLogger(__name__)

BEAT_S = 1.0
PAUSE_S = 3 * BEAT_S
"""A thread that had no turn for so long was paused with all of its machine (a virtual machine, a
laptop's lid), or is kept from running.
"""
STORE_RANK = 0
STORE_RANK_FIRST_S = 5 * BEAT_S
"""How much sooner rank 0 leaves. It keeps the jobs and should note why they end; if another rank
left before it, it would see a closed connection only.
"""
NUM_FRAMES = 6
COLLECTIVES = (str(Path("torch") / "distributed"), str(Path("backends") / "groups"))
"""Parts of the paths of all files in which a rank waits for others."""


class Watch:
    """Sends heartbeats over the rendezvous store, from a thread of its own on every rank.

    A stopped rank sends none, and one whose main thread hangs reports that. After `timeout_s` the
    others leave, and torchelastic restarts all. The main thread cannot do this: it may wait in a
    collective.
    """

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        activity: Activity | None = None,
        local_ranks: range | None = None,
        on_leave: Callable[[ExitReport], None] = lambda ending: None,
        is_device_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """activity: of this rank's main thread. local_ranks: on this machine; all if not given.

        is_device_busy: on a GPU a rank waits for others in a kernel, wherever its main thread is.

        on_leave: called with the reason just before this process ends.
        """
        self._store = store
        self._on_leave = on_leave
        self._is_device_busy = is_device_busy
        self._activity = activity or Activity()
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._local_ranks = local_ranks if local_ranks is not None else range(world_size)
        self._timeout_s = timeout_s
        self._num_answers = 0
        self._main = threading.main_thread().ident

    def start(self) -> None:
        has_started()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        if self._others:
            threading.Thread(
                target=self._watch_store, name="watch of the store", daemon=True
            ).start()

    def _run(self) -> None:
        self._store.set_timeout(timedelta(seconds=self._timeout_s))
        seen: dict[int, tuple[bytes, int]] = {}
        awake_since = turn_at = time.monotonic()
        for beat in range(1, 2**62):
            last_turn_at, turn_at = turn_at, time.monotonic()
            if turn_at - last_turn_at > PAUSE_S:
                awake_since = turn_at
            try:
                self._store.set(f"beat/{self._rank}", str(beat))
                lost = [other for other in self._others if self._is_lost(other, beat, seen)]
                ended = self._end_on_another_machine()
                stuck = self._activity.overdue(self._timeout_s, awake_since_s=awake_since)
                ending = ended or (self._who_is_stuck(stuck) if stuck and not lost else None)
            except (RuntimeError, OSError) as error:
                # the process that holds the store is gone: rank 0, or torchelastic's agent
                self._leave(ExitReport(why=f"the rendezvous store does not answer: {error}"))
                return
            if lost and ending is None:
                ending = ExitReport(
                    why=f"rank {lost[0]} has sent no heartbeat for {self._timeout_s:g} s",
                    rank=lost[0],
                )
            if ending is not None:
                if stuck and self._rank != STORE_RANK:
                    time.sleep(STORE_RANK_FIRST_S)
                self._leave(ending)
                return
            self._num_answers += 1
            time.sleep(BEAT_S)

    def _end_on_another_machine(self) -> ExitReport | None:
        """Return the report of a rank that restarted on another machine
        (hosts/supervision/rendezvous.py). Its closed connections may not be visible yet.
        """
        return (
            ExitReport.from_text(self._store.get("ended").decode())
            if self._store.check(["ended"])
            else None
        )

    def _watch_store(self) -> None:
        """Leave if rank 0, which holds the store, hangs: then no answer comes, and the store's own
        time-out does not apply.
        """
        num_answers = num_silent = 0
        while num_silent * BEAT_S < self._timeout_s + 2 * BEAT_S:
            time.sleep(BEAT_S)
            num_silent = num_silent + 1 if self._num_answers == num_answers else 0
            num_answers = self._num_answers
        why = (
            f"the rendezvous store in rank {STORE_RANK} has not answered for {self._timeout_s:g} s"
        )
        self._leave(ExitReport(why=why, rank=STORE_RANK))

    def _is_lost(self, other: int, turn: int, seen: dict[int, tuple[bytes, int]]) -> bool:
        """Silence is counted in turns of this thread, not in time: all of the machine may have been
        paused.
        """
        key = f"beat/{other}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if other not in seen or seen[other][0] != beat:
            seen[other] = (beat, turn)
        return (turn - seen[other][1]) * BEAT_S > self._timeout_s

    def _who_is_stuck(self, what: str) -> ExitReport:
        """Return which rank hangs: all make no progress, but only the cause waits in no collective
        or kernel.
        """
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        waits = self._is_device_busy() or any(
            place in frame.filename for frame in stack for place in COLLECTIVES
        )
        at = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in stack[-NUM_FRAMES:]]
        logger.error(
            "rank %d has %s. It is %s, at\n  %s",
            self._rank,
            what,
            "waiting" if waits else "working",
            "\n  ".join(at),
        )
        self._store.set(f"stuck/{self._rank}", json.dumps(waits))
        working = [rank for rank in (self._rank, *self._others) if not self._waits(rank)]
        if len(working) != 1:
            return ExitReport(why=f"the ranks have {what}", rank=self._rank)
        return ExitReport(why=f"rank {working[0]} has {what}", rank=working[0])

    def _waits(self, rank: int) -> bool:
        """Whether that rank reports that it waits for others. It has two heartbeats to do so."""
        key = f"stuck/{rank}"
        for _ in range(20):
            if self._store.check([key]):
                return bool(json.loads(self._store.get(key)))
            time.sleep(BEAT_S / 10)
        return False

    def _leave(self, ending: ExitReport) -> None:
        logger.error("rank %d leaves: %s", self._rank, ending.why)
        self._on_leave(ending)
        if (
            ending.rank is not None
            and ending.rank != self._rank
            and ending.rank in self._local_ranks
        ):
            kill_rank(ending.rank - self._local_ranks.start)
        with contextlib.suppress(Exception):  # whatever a handler does, this process must end now
            logging.shutdown()
        os._exit(EXIT_LOST_RANK)
