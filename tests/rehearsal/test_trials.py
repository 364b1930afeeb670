"""What happens before a rank has its model, rehearsed: methods are tried (--backend=auto), also one
that fails on a rank, and a spare process imports what ranks import without touching a GPU.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from backends import planner
from backends.autotune.candidates import Candidate
from backends.autotune.trials import PipelineSubject, Trials
from backends.groups.alarm import Alarm
from backends.groups.control_group import gather_outcomes
from hosts.supervision import spares
from hosts.supervision.exit_reports import RankNotes
from tests.backends.features import TABLE
from tests.checkpoints import checkpoint
from tests.rehearsal.case import PATCH, SEGMENTS
from tests.rehearsal.gpus import COMMUNICATOR_BYTES
from tests.rehearsal.order import problems
from tests.rehearsal.rehearsal import Rehearsal
from tests.rehearsal.runs import asked_of, load

TRIED = {
    "cfg": ("xdit", {"use_cfg_parallel": True}),
    "patches": ("distrifuser", PATCH),
    "segments": ("asyncdiff", SEGMENTS),
}


def _candidates(spec):
    for name, (backend, options) in TRIED.items():
        plan = planner(backend)(spec, {**options, "checkpoint": str(checkpoint(spec.name))}, 2)
        yield Candidate(name=name, backend=backend, ranks=2, plan=plan)


def _try_methods(rank, world_size):
    spec = TABLE["sdxl"]
    candidates = list(_candidates(spec))
    alarm = Alarm(dist.distributed_c10d._get_default_store().clone())
    with Rehearsal(num_devices=2, index=rank, hang_s=15.0) as rehearsal:
        pipe = load("sdxl", torch.device("cuda", rank), variant="fp32", share=(rank, 2))
        asked = asked_of(spec, num_inference_steps=4, warmup_steps=1)
        trials = Trials(
            PipelineSubject(pipe, asked, asked),
            spec=spec,
            rank=rank,
            world_size=2,
            halves=2,
            alarm=alarm,
        )
        assert trials.link().communicator_bytes == COMMUNICATOR_BYTES
        assert trials.alone().step_s > 0
        for candidate in candidates:
            assert trials.trial(candidate)[1] == ""
        closeness, failures = trials.closeness(candidates)
        assert not failures
        assert closeness.keys() == TRIED.keys()
        assert closeness["cfg"] > 60
        for streams in ("pairs", "groups"):
            assert problems(gather_outcomes(rehearsal.journal.entries), streams=streams) == []
        for candidate in candidates:
            _see_it_fail(trials, candidate, pipe.pipe.unet, rank)
            assert trials.trial(candidate)[1] == "", "after it failed it cannot be tried again"


def _see_it_fail(trials, candidate, unet, rank):
    """Rank 1 fails in the middle of its network; rank 0 then waits for it in a kernel."""
    block = unet.mid_block
    inner = block.forward

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    if rank == 1:
        block.forward = fail
    _, why = trials.trial(candidate)
    block.forward = inner
    assert "out of luck" in why


def test_methods_are_tried_by_the_rules_also_one_that_fails_on_a_rank(run_on_ranks):
    checkpoint("sdxl")
    run_on_ranks(_try_methods, 2)


SPARE = """
import json, os, sys, traceback
import pytest
import torch
from hosts.supervision import spares
touched = []
def touch():
    touched.append(traceback.format_stack(limit=12))
    raise RuntimeError("this process is no rank yet")
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.version.cuda = "13.0"
torch.cuda._lazy_init = touch
spares.request_parent_death_signal = lambda: None
spares.select.select = lambda *_: ([], [], [])
spares.lowest_capability = lambda: tuple(map(int, sys.argv[2:])) or None
spares.wait_for_turn(os.environ, spares.Path(sys.argv[1]))
print(json.dumps([len(sys.modules), ["".join(stack) for stack in touched]]))
"""
"""A spare rank that imports everything, where torch says that there are GPUs. What makes a CUDA
context goes through _lazy_init.
"""


def _spare(notes, *capability):
    """What it did with GPUs before it became a rank. capability: as the driver's library tells."""
    names = [name for name in sys.modules if not name.startswith(("tests", "pytest", "_pytest"))]
    RankNotes(notes, attempt=0).put_modules(names)
    run = subprocess.run(
        [sys.executable, "-c", SPARE, str(notes), *capability],
        env={**os.environ, spares.SPARE: "1"},
        input="{}\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
    )
    number, touched = json.loads(run.stdout.splitlines()[-1])
    assert number > 1000
    return touched


@pytest.mark.slow  # all of the libraries are imported twice
def test_spare_ranks_do_not_touch_gpus(tmp_path):
    """Also not through another library, such as peft, which imports bitsandbytes."""
    assert _spare(tmp_path, "9", "0") == []
    assert "bitsandbytes" in _spare(tmp_path)[0]
