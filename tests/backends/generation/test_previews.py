"""Previews of videos: whether or not there are any, the job is done."""

import pytest

from tests.backends.features import TABLE, loaded, request_for

VIDEOS = [name for name, spec in TABLE.items() if spec.output == "video"]
WITHOUT = ("kandinsky5", "ltx", "ltx2")
"""Their latents do not tell which dimensions are which."""
SHORT = ("cogvideox",)


@pytest.mark.parametrize(
    "name",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in VIDEOS],
)
def test_video_is_made_while_somebody_looks_on(name):
    pipe, seen = loaded(TABLE[name]), []
    request = request_for(TABLE[name], num_inference_steps=2)
    pipe.generate(request, on_step=lambda step, num_steps, x: seen.append(pipe.preview(x)))
    assert seen
    assert all((small is None) == (name in WITHOUT) for small in seen)
