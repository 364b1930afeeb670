"""A start and an end that leave no step are refused in every dialect that has them."""

import pytest

from tests.hosts.dialects.reading import ReadingHost, message_of, param_of
from tests.hosts.dialects.test_rules import IMAGE, NUMBERED, OPENAI, body

START = {"init_image": IMAGE}


@pytest.fixture(scope="module")
def images():
    with ReadingHost() as host:
        yield host


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/v1/jobs", {"strength": 0.2, "stop_step": 20, **START}, "strength"),
        ("/generate", {"denoise": 0.2, "stop_step": 20, **START}, "denoise"),
        ("/v1/images/edits", {"strength": 0.2, "stop_step": 20}, "strength"),
        ("/v1/images/variations", {"strength": 0.2, "stop_step": 20}, "strength"),
        *((path, {"denoising_end": 1e-4}, "denoising_end") for path in NUMBERED),
        *((path, {"stop_step": 2, "first_step": 3, **START}, "stop_step") for path in NUMBERED),
        ("/v1/jobs", {"strength": 0.2, "denoising_end": 0.1, **START}, "denoising_end"),
        ("/generate", {"denoise": 0.2, "denoising_end": 0.1, **START}, "denoising_end"),
        ("/generate", {"denoising_start": 0.2, "denoising_end": 0.1, **START}, "denoising_start"),
    ],
)
def test_a_start_and_an_end_that_leave_no_step_are_refused(images, path, fields, named):
    spaced = {"scheduler": {"scheduler": "euler", "timestep_spacing": "trailing"}}
    answer = images.post(path, body(path, **fields, **spaced))
    said = message_of(answer)
    assert answer.status_code == 400 and "no step is left of " in said, path
    assert f"{named}={fields[named]:g}" in said
    assert param_of(answer) in (fields if path in OPENAI else (None,))
