"""Schedulers on a GPU, rehearsed: no step makes the host wait for the device to look up a timestep,
and images are the CPU's.
"""

import pytest
import torch

from backends.generation.schedulers import SCHEDULERS
from tests.backends.features import TABLE, combined, prepare
from tests.rehearsal.one_rank_cases import OneRank
from tests.rehearsal.runs import rehearse_one

SHORT = ("ddim", "pndm", "euler", "ddpm")
MIDDLE = "step 2"
NOISE = "copy from the CPU"
"""It is drawn on the CPU, so that a seed gives the same image everywhere."""


NEEDS_A_GPU = ("dpm_sde",)
"""It draws with a generator of the GPU."""


def _rehearse(rank, world_size, type_name, names):
    for name in names:
        case = OneRank(label=name, request={"scheduler": {"scheduler": name}})
        off, rehearsal = rehearse_one(
            type_name, case, variant="fp32", device=torch.device("cuda", 1)
        )
        waits = {
            where: count
            for where, count in rehearsal.journal.waits_in(MIDDLE).items()
            if not where.startswith(NOISE)
        }
        assert off <= 0.1, (name, off)
        assert not waits, (name, waits)


def test_schedulers_do_not_make_the_host_wait(run_on_ranks):
    prepare(TABLE["sd2"], [])
    run_on_ranks(_rehearse, 1, "sd2", SHORT)


def _rehearse_gguf(rank, world_size):
    case = OneRank(label="gguf", load=combined(["gguf"], TABLE["flux"]).load)
    off, rehearsal = rehearse_one("flux", case, variant="fp32", device=torch.device("cuda", 1))
    assert off <= 0.1, off
    waits = rehearsal.journal.waits_in(MIDDLE)
    assert not waits, waits


def test_gguf_layers_do_not_make_the_host_wait(run_on_ranks):
    prepare(TABLE["flux"], ["gguf"])
    run_on_ranks(_rehearse_gguf, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in SCHEDULERS if name not in (*SHORT, *NEEDS_A_GPU)]
)
def test_every_scheduler_on_a_gpu(run_on_ranks, name):
    type_name = "sd3" if SCHEDULERS[name].flow else "sd2"
    prepare(TABLE[type_name], [])
    run_on_ranks(_rehearse, 1, type_name, (name,))
