"""Classes without a row equal plain diffusers on one rank, and one rank on two."""

import pytest

from tests.backends.generic_classes import METHODS, buildable, check_class, outcomes_of
from tests.checkpoints.variants import MODULAR, variant

QUICK = {
    "StableDiffusion3Img2ImgPipeline": "batch",  # both halves in one call
    "QwenImageInpaintPipeline": "calls",  # one after the other
    "StableDiffusionXLPAGPipeline": "whole",  # three rows, which two ranks cannot share
    "ZImageModularPipeline": "whole",
}
"""Class -> how two ranks share its guidance."""
WITHOUT_TOKENS = ("StableDiffusionXLPAGPipeline",)
"""Classes with a UNet, whose tokens xdit cannot spread."""
SLOW = (
    "AuraFlowPipeline",
    "ChromaPipeline",
    "CogVideoXPipeline",
    "CogView3PlusPipeline",
    "LTXImageToVideoPipeline",
    "LTXPipeline",
    "LattePipeline",
    "MochiPipeline",
    "ZImageImg2ImgPipeline",
    *MODULAR,
)


def check(rank: int, world_size: int) -> None:
    for name, split in QUICK.items():
        outcome = check_class(name, rank, world_size)
        assert outcome.one_rank == 0, outcome
        without = {"tokens"} if name in WITHOUT_TOKENS else set()
        assert outcome.two_ranks.keys() == METHODS.keys() - without, outcome
        assert outcome.is_right, outcome
        assert outcome.split == split, outcome


def test_classes_of_each_kind_equal_plain_diffusers_on_one_rank_and_on_two(run_on_ranks):
    for name in QUICK:
        variant(name)  # before ranks start: transformers saves nothing on ranks above 0
    run_on_ranks(check, 2)


@pytest.mark.slow
def test_more_classes_equal_plain_diffusers_on_one_rank_and_on_two():
    assert not [name for name in SLOW if buildable(name)]
    wrong = [outcome for outcome in outcomes_of(list(SLOW)) if not outcome.is_right]
    assert not wrong
