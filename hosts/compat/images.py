"""Converts image nodes of a pickle to PIL images in mode RGB."""

from PIL import Image

from hosts.compat.unpickle import ImageNode, MalformedPickle
from hosts.http.limits import DecodeLimits

_BYTES_PER_PIXEL = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_MAX_SIDE = 2**16


def from_node(node: ImageNode, limits: DecodeLimits) -> Image.Image:
    """Return the image as RGB: alpha is dropped, a palette applied, `info` ignored.

    Raises MalformedPickle.
    """
    if type(node.state) is not list or not 5 <= len(node.state) <= 8:
        raise MalformedPickle("the image does not have the five parts that PIL writes")
    _info, mode, size, palette, data = node.state[:5]
    if type(mode) is not str or mode not in _BYTES_PER_PIXEL:
        raise MalformedPickle(f"the image's mode must be one of {', '.join(_BYTES_PER_PIXEL)}")
    width, height = _checked_size(size, limits)
    expected = width * height * _BYTES_PER_PIXEL[mode]
    if type(data) is not memoryview or len(data) != expected:
        raise MalformedPickle(
            f"an image of {width}x{height} in mode {mode} must have {expected} bytes"
        )
    image = Image.frombytes(mode, (width, height), data)
    if mode == "P":
        image.putpalette(_checked_palette(palette))
    return image if mode == "RGB" else image.convert("RGB")


def _checked_size(size: object, limits: DecodeLimits) -> tuple[int, int]:
    if (
        type(size) is not tuple
        or len(size) != 2
        or not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in size)
    ):
        raise MalformedPickle(f"the image's size must be two integers from 1 to {_MAX_SIDE}")
    if size[0] * size[1] > limits.max_pixels:
        raise MalformedPickle(
            f"the image of {size[0]}x{size[1]} has more than {limits.max_pixels} pixels"
        )
    return size


def _checked_palette(palette: object) -> bytes:
    """Return red, green, blue of up to 256 colours, in the order of PIL's getpalette()."""
    if type(palette) is not list or not 3 <= len(palette) <= 768 or len(palette) % 3:
        raise MalformedPickle("the image's palette must list 1 to 256 colours of three numbers")
    if not all(type(number) is int and 0 <= number <= 255 for number in palette):
        raise MalformedPickle("the image's palette must hold integers from 0 to 255")
    return bytes(palette)
