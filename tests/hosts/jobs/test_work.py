"""The work of a job: pixels times frames times steps."""

import pytest

from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from hosts.jobs.work import work_of

SDXL = read_table()["sdxl"]
SIZE = {"width": 1000, "height": 500}


def load_request(**defaults):
    return LoadRequest(model_type="sdxl", checkpoint="", variant="fp32", **defaults)


@pytest.mark.parametrize(
    ("asked", "pixel_steps"),
    [
        ({**SIZE, "num_inference_steps": 4}, 2e6),
        ({**SIZE, "num_inference_steps": 4, "num_frames": 3}, 6e6),
        ({**SIZE, "timesteps": [999, 500]}, 1e6),
        ({**SIZE, "sigmas": [10.0, 5.0, 0.0]}, 1e6),
        ({}, SDXL.width * SDXL.height * SDXL.num_inference_steps),
    ],
    ids=["image", "video", "timesteps", "sigmas", "defaults of the type"],
)
def test_work_is_pixels_times_steps(asked, pixel_steps):
    work = work_of(GenerateRequest(**asked), SDXL, load_request())
    assert work.pixel_steps == pytest.approx(pixel_steps)


def test_defaults_of_the_host_come_before_those_of_the_model_type():
    load = load_request(**SIZE, num_inference_steps=4)
    assert work_of(GenerateRequest(), SDXL, load).pixel_steps == 2e6
    assert work_of(GenerateRequest(num_inference_steps=2), SDXL, load).pixel_steps == 1e6
