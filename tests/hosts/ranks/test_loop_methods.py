"""Ranks that change their method from job to job: the image is that of the method, whatever was
attached before, and the next method takes a request that the best one cannot do.
"""

from dataclasses import replace

import numpy as np
import torch

from backends.generation.pipeline import load_pipeline
from backends.groups.mesh import Mesh
from backends.request import GenerateRequest
from hosts.ranks.commands import Generate, Outcome, Rejoin, SplitIntoTeams, Stop
from hosts.ranks.dispatch import FollowerDispatcher
from hosts.ranks.loop import RankLoop
from tests.hosts.launch.test_auto_backend import start, with_steps

SPLIT, SEGMENTS, CACHED = (
    "distrifuser cfg 2",
    "asyncdiff segment 2 stride 1",
    "distrifuser cfg 2 + deep,2",
)
BANDS = "distrifuser patch 2 full_sync"
STEPS = {"single": 1.0, SPLIT: 0.6, BANDS: 0.5, SEGMENTS: 0.3, CACHED: 0.2}
REQUEST = GenerateRequest(
    prompt="a red circle", seed=3, num_inference_steps=16, height=64, width=64
)
TALL = REQUEST.model_copy(update={"height": 8, "num_inference_steps": 2})
"""One row of latents, which two ranks cannot share."""


class Script(FollowerDispatcher):
    """On rank 0: these commands, one after the other."""

    def __init__(self, commands):
        super().__init__(rank=0)
        self._commands = list(commands)
        self.made = []

    def next_command(self, check):
        command = self._commands.pop(0)
        if isinstance(command, Generate):
            for request in command.requests:
                check(request, command.methods)
        return command

    def generated(self, results, outcome: Outcome):
        assert outcome.failure is None, outcome.failure.trace
        self.made += results


def loop_of(found, rank, dispatcher):
    mesh = Mesh(found.plan, rank=rank, device=torch.device("cpu"))
    pipeline = load_pipeline(found.spec, found.load, device=torch.device("cpu"))
    loop = RankLoop(
        rank=rank,
        spec=found.spec,
        mesh=mesh,
        dispatcher=dispatcher,
        methods=found.methods.of_size,
        pipeline=pipeline,
    )
    assert loop._load(found.load) is None
    return loop


def check_changes(rank, world_size):
    alone = start(ranks=1, height=64, width=64)
    reference = load_pipeline(alone.spec, alone.load, device=torch.device("cpu"))
    options = {"height": 64, "width": 64}
    estimated = start(**options)
    work = replace(estimated.auto.measured.work, step_s=1.0)
    found = start(measured=with_steps(estimated, steps=STEPS, work=work), **options)
    assert {SPLIT, SEGMENTS, CACHED} <= {*found.methods.of_size[2]}
    wanted = [(SPLIT,), (SEGMENTS,), (CACHED,), (SPLIT,), (SEGMENTS,), (SPLIT,)]
    commands = [
        Generate(job_ids=(str(index),), requests=(REQUEST,), methods=methods)
        for index, methods in enumerate(wanted)
    ]
    commands += [
        Generate(job_ids=("tall",), requests=(TALL,), methods=(BANDS, SPLIT)),
        SplitIntoTeams(team_size=1),
        Generate(job_ids=("own",), requests=(REQUEST,), methods=("single",)),
        Rejoin(),
        Generate(job_ids=("last",), requests=(REQUEST,), methods=(SEGMENTS,)),
        Stop(),
    ]
    dispatcher = Script(commands) if rank == 0 else Script([Rejoin()])
    if rank != 0:
        dispatcher.next_command = lambda check: None
    loop = loop_of(found, rank, dispatcher)
    if rank != 0:  # leads its own team, for which there is no job
        own = Script([Rejoin()])
        dispatcher.split = lambda team_size: _context(own)
    assert loop.run() is None
    if rank == 0:
        compare(dispatcher.made, reference)
    loop.unload()


def _context(value):
    from contextlib import nullcontext

    return nullcontext(value)


def compare(made, reference):
    names = [result.report["method"] for result in made]
    assert names == [SPLIT, SEGMENTS, CACHED, SPLIT, SEGMENTS, SPLIT, SPLIT, "single", SEGMENTS]
    image, tall = (reference.generate(one).frames.astype(int) for one in (REQUEST, TALL))
    for name, result in zip(names[:6], made[:6], strict=True):
        largest = np.abs(result.frames.astype(int) - image).max()
        assert (largest <= 1) or name != SPLIT, name
        assert (result.exactness == "approximate") is (name != SPLIT)
    assert np.array_equal(made[1].frames, made[4].frames)
    assert np.array_equal(made[1].latents, made[8].latents)
    assert not np.array_equal(made[1].latents, made[3].latents)
    assert made[2].report["step_cache"] == {"calls": 16, "skipped": 8}
    assert "step_cache" not in made[3].report
    assert np.abs(made[6].frames.astype(int) - tall).max() <= 1
    assert np.abs(made[7].frames.astype(int) - image).max() <= 1


def test_ranks_change_their_method_between_jobs(run_on_ranks):
    run_on_ranks(check_changes, 2)
