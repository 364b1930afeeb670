"""What comes after the first job of a rehearsed case: jobs of other kinds, other ranks' or another
model's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from backends.request import GenerateResult
from hosts.dialects.a1111_passes import Hires
from hosts.ranks.dispatch import END, GO_ON
from tests.backends.features import HEIGHT, WIDTH
from tests.rehearsal.case import Further

if TYPE_CHECKING:
    from tests.rehearsal.runs import Rank

Results = Sequence[GenerateResult]
SECOND_PASS = {"strength": 0.8}


def _second_pass(here: "Rank", first: GenerateResult) -> Results:
    """Hires fix: it begins with the enlarged latents of the first job."""
    hires = Hires(
        width=2 * WIDTH,
        height=2 * HEIGHT,
        upscaler="Latent",
        fields=SECOND_PASS,
        sent_as={},
        facts={},
    )
    return here.results(**hires.start(first))


def _another_prompt(here: "Rank", first: GenerateResult) -> Results:
    """Comes between two jobs with the same prompt: what that was encoded to is kept."""
    other = here.results(prompt="a dog")
    hits = here.pipe._prompts.num_hits
    again = here.results()
    assert here.pipe._prompts.num_hits > hits, "the prompt was encoded again"
    assert np.abs(again[0].frames.astype(int) - first.frames).max() <= 1, "it differs the next time"
    return [*other, *again]


def _early_end(here: "Rank", first: GenerateResult) -> Results:
    """An interrupted job ends with the image so far."""
    here.dispatcher.signal = END
    results = here.results()
    here.dispatcher.signal = GO_ON
    assert "ended_early" in results[0].report
    return results


def _teams(here: "Rank", first: GenerateResult) -> Results:
    """The ranks split into teams with a job each, and rejoin."""
    return [*here.results_of_team(), *here.results()]


def _another_model(here: "Rank", first: GenerateResult) -> Results:
    """The GPUs are another model's for a while (--models), and this one's weights are kept in main
    memory.
    """
    here.make_way()
    here.begin()
    return here.results()


FURTHER: Mapping[Further, Callable[["Rank", GenerateResult], Results]] = {
    "second pass": _second_pass,
    "another prompt": _another_prompt,
    "early end": _early_end,
    "teams": _teams,
    "another model": _another_model,
}
