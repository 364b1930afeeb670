"""Pickled images and conditionings that do not fit together are refused, with the reason."""

import base64

import pytest
import torch
from PIL import Image

from hosts.compat import codec
from tests.hosts.compat.forge import (
    PROTO,
    blob,
    encoded,
    forged_image,
    pickled,
)
from tests.hosts.compat.refusal import refusal
from tests.hosts.compat.test_codec_refusals import IMAGE

IMAGES = {
    "too few parts": ([{}, "RGB", (1, 1)], "five parts"),
    "a mode outside the list": (
        [{}, "F", (1, 1), None, bytes(4)],
        "mode must be one of L, P, LA, RGB, RGBA",
    ),
    "a mode that is a list": ([{}, ["RGB"], (1, 1), None, bytes(3)], "mode must be one of"),
    "too few bytes": ([{}, "RGB", (2, 2), None, bytes(11)], "must have 12 bytes"),
    "too many bytes": ([{}, "RGB", (2, 2), None, bytes(13)], "must have 12 bytes"),
    "text instead of bytes": ([{}, "L", (2, 2), None, "abcd"], "must have 4 bytes"),
    "a huge size": ([{}, "RGB", (2**16, 2**16), None, b""], "more than 25165824 pixels"),
    "a side that is too long": (
        [{}, "RGB", (2**31, 1), None, b""],
        "size must be two integers from 1 to 65536",
    ),
    "a negative side": ([{}, "RGB", (-1, -1), None, bytes(3)], "size must be"),
    "no pixels": ([{}, "RGB", (0, 5), None, b""], "size must be"),
    "a size that is a list": ([{}, "RGB", [1, 1], None, bytes(3)], "size must be"),
    "a size of floats": ([{}, "RGB", (1.0, 1.0), None, bytes(3)], "size must be"),
    "no palette": ([{}, "P", (1, 1), None, b"\0"], "must list 1 to 256 colours"),
    "a palette that is too long": (
        [{}, "P", (1, 1), [0] * 771, b"\0"],
        "must list 1 to 256 colours",
    ),
    "a palette of two thirds of a colour": (
        [{}, "P", (1, 1), [0, 0], b"\0"],
        "must list 1 to 256 colours",
    ),
    "a palette of large numbers": ([{}, "P", (1, 1), [0, 0, 256], b"\0"], "integers from 0 to 255"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image_that_does_not_fit_together_is_refused(case):
    state, reason = IMAGES[case]
    assert reason in refusal(codec.decode_image, encoded(forged_image(state)))


def test_image_without_state_is_refused():
    assert "five parts" in refusal(codec.decode_image, encoded(PROTO + IMAGE + b")\x81."))


def test_palette_shorter_than_its_pixels_reads_nothing_outside():
    image = codec.decode_image(
        encoded(forged_image([{}, "P", (2, 1), [9, 8, 7], b"\x00\xff"])), field="image"
    )
    assert image.getpixel((0, 0)) == (9, 8, 7)
    assert image.getpixel((1, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "header",
    [
        "data:text/html;base64,",
        "data:image/png,",
        "data:image/png;base64",
        "data:" + "x" * 200 + ",",
    ],
)
def test_data_url_of_another_form_is_refused(header):
    assert "a data URL must begin with" in refusal(codec.decode_image, header + "AAAA")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"GIF89a" + bytes(50), "neither an image file"), (b"", "neither an image file")],
)
def test_other_data_is_refused_as_an_image(data, reason):
    assert reason in refusal(codec.decode_image, encoded(data))


def test_tensor_in_place_of_a_image_is_refused_and_the_reverse():
    assert "something other than an image" in refusal(codec.decode_image, pickled(torch.ones(2)))
    assert "something other than a tensor" in refusal(
        codec.decode_tensor, pickled(Image.new("L", (1, 1)))
    )


CONDITIONINGS = {
    "no pairs": ([], "not a list of at least one pair"),
    "a tensor": (torch.ones(1, 2, 3), "not a list of at least one pair"),
    "a number as pair": ([5], "first entry is not a pair"),
    "a triple": ([[torch.ones(1, 2, 3), {}, {}]], "first entry is not a pair"),
    "a pair without dict": ([[torch.ones(1, 2, 3), []]], "first entry is not a pair"),
    "a number as tensor": ([[5, {}]], "the conditioning's tensor is not a tensor"),
    "two dimensions": ([[torch.ones(2, 3), {}]], "the conditioning's tensor has shape [2, 3]"),
    "a batch of two": ([[torch.ones(2, 4, 3), {}]], "the first of length 1"),
    "a number as pooled output": (
        [[torch.ones(1, 2, 3), {"pooled_output": 1}]],
        "pooled_output is not a tensor",
    ),
    "a pooled output of three dimensions": (
        [[torch.ones(1, 2, 3), {"pooled_output": torch.ones(1, 1, 1)}]],
        "pooled_output has shape",
    ),
}


@pytest.mark.parametrize("case", CONDITIONINGS)
def test_conditioning_of_another_form_is_refused(case):
    value, reason = CONDITIONINGS[case]
    assert reason in refusal(codec.decode_conditioning, pickled(value))


def test_blob_in_place_of_a_image_is_refused():
    assert "something other than an image" in refusal(
        codec.decode_image, encoded(PROTO + blob(b"abc") + b".")
    )
    assert base64.b64decode(encoded(blob(b"abc"))).endswith(b"abc")
