"""What no text encoder reads of a prompt is reported, and nothing else."""

import pytest
import torch

from backends.errors import RequestError
from backends.generation.pipeline import LoadedPipeline
from tests.backends.features import TABLE, loaded, request_for
from tests.every_type import EVERY_TYPE

WITH_PROMPT = [
    each for each in EVERY_TYPE if "prompt" in TABLE[getattr(each, "values", [each])[0]].requires
]
BEGINNING = "a cat " * 600
"""More tokens than any of these encoders reads, but those of images that are edited."""


def asked(pipe: LoadedPipeline, prompt: str, **fields: object):
    steps = 2 if pipe.spec.name == "mochi" else 1  # whose noise levels need two
    small = {"height": 64, "width": 64, "num_inference_steps": steps}
    return request_for(pipe.spec, **small, prompt=prompt, **fields)


def unread(pipe: LoadedPipeline, prompt: str) -> int:
    return pipe.generate(asked(pipe, prompt)).report.get("unread_tokens", 0)


@pytest.mark.parametrize("name", WITH_PROMPT)
def test_what_does_not_change_the_image_is_reported(name):
    pipe = loaded(TABLE[name])
    prompts = (f"{BEGINNING}red", f"{BEGINNING}blue car over there")
    try:
        made = [pipe.generate(asked(pipe, prompt)) for prompt in prompts]
    except RequestError as error:
        assert "prompt is too long" in str(error)
        return
    is_cut = torch.equal(*(torch.from_numpy(each.frames) for each in made))
    assert [each.report.get("unread_tokens", 0) > 0 for each in made] == [is_cut, is_cut]
    assert unread(pipe, "a cat") == 0


def test_every_prompt_and_row_has_its_own_count(caplog):
    pipe = loaded(TABLE["sd1"])
    long = unread(pipe, BEGINNING)
    assert unread(pipe, BEGINNING) == long > 1000, "its encoding was kept"
    assert unread(pipe, f"{BEGINNING}a cat ") > long
    prompts = ("a cat", BEGINNING, "a dog")
    rows = pipe.generate_together([asked(pipe, prompt) for prompt in prompts])
    assert [row.report.get("unread_tokens", 0) for row in rows] == [0, long, 0]
    negative = pipe.generate(asked(pipe, "a cat", negative_prompt=BEGINNING))
    assert negative.report["unread_tokens"] == long
    assert f"the last {long} tokens of the prompt were ignored; --compel" in caplog.text


def test_an_encoder_that_reads_more_counts():
    """T5 reads 512 tokens of FLUX's prompts, of which CLIP reads 77."""
    assert unread(loaded(TABLE["flux"]), "a cat " * 60) == 0
