"""Image nodes of a pickle, and image files -> PIL images in mode RGB."""

import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageOps

from hosts.compat.limits import DecodeLimits
from hosts.compat.unpickle import ImageNode, MalformedPickle

FORMATS = ("PNG", "JPEG", "WEBP")
_BYTES_PER_PIXEL = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_MAX_SIDE = 2**16
_MAX_JPEG_SCANS = (
    32  # a usual progressive JPEG has 10; each further one decodes the whole image again
)


class UnreadableImage(ValueError):
    """The bytes are no image of an allowed format, damaged, or too large."""


def is_image_file(data: bytes | memoryview) -> bool:
    """Whether the first bytes are those of a PNG, JPEG or WebP file."""
    head = bytes(data[:12])
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (
        head[:4] == b"RIFF" and head[8:] == b"WEBP"
    )


def from_node(node: ImageNode, limits: DecodeLimits) -> Image.Image:
    """The image as RGB; alpha is dropped, a palette applied, its info ignored. Raises
    MalformedPickle.
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
    """Red, green, blue of up to 256 colours, as PIL's getpalette() lists them."""
    if type(palette) is not list or not 3 <= len(palette) <= 768 or len(palette) % 3:
        raise MalformedPickle("the image's palette must list 1 to 256 colours of three numbers")
    if not all(type(number) is int and 0 <= number <= 255 for number in palette):
        raise MalformedPickle("the image's palette must hold integers from 0 to 255")
    return bytes(palette)


def from_file_bytes(data: bytes | memoryview, limits: DecodeLimits) -> Image.Image:
    """The first frame of a PNG, JPEG or WebP file as RGB, upright. Raises UnreadableImage."""
    if not is_image_file(data):
        raise UnreadableImage("the data is not a PNG, JPEG or WebP image")
    if bytes(data[:3]) == b"\xff\xd8\xff" and bytes(data).count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise UnreadableImage(f"the JPEG has more than {_MAX_JPEG_SCANS} scans")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:  # before any pixel is decoded
                raise UnreadableImage(
                    f"the image of {image.width}x{image.height} has more than {limits.max_pixels} "
                    "pixels"
                )
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # PIL's own bound, met while the header is read
        raise UnreadableImage(f"the image has more than {limits.max_pixels} pixels") from error
    except (
        Exception
    ) as error:  # PIL's readers raise a dozen types on damaged files, SyntaxError among them
        raise UnreadableImage(
            "the image file is damaged or of a kind that cannot be read"
        ) from error


def read_allowed_file(path: str, allowed_dirs: Iterable[Path | str], limits: DecodeLimits) -> bytes:
    """The contents of a regular file that lies, after symbolic links are resolved, inside one of
    the folders.

    Raises UnreadableImage; outside the folders the message is the same whether or not the file
    exists.
    """
    folders = [Path(os.path.realpath(folder)) for folder in allowed_dirs]
    if not folders:
        raise UnreadableImage("this server reads no image files by path; send the image as base64")
    allowed = ", ".join(map(str, folders))
    if len(path) > 4096 or "\0" in path or not path.isprintable():
        raise UnreadableImage(f"the text is not a path of a file in {allowed}")
    resolved = Path(os.path.realpath(path))
    if not any(resolved.is_relative_to(folder) for folder in folders):
        raise UnreadableImage(
            f"the path is outside the folders that images are read from: {allowed}; or send the "
            "image as base64"
        )
    try:
        # O_NOFOLLOW: the last part was resolved above and may not become a link since; O_NONBLOCK:
        # a pipe must not block
        descriptor = os.open(resolved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadableImage(f"the path is no readable file in {allowed}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(f"the path is no readable file in {allowed}")
        if status.st_size > limits.max_encoded_bytes:
            raise UnreadableImage(
                f"the file has {status.st_size} bytes; allowed are {limits.max_encoded_bytes}"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limits.max_encoded_bytes)
    finally:
        os.close(descriptor)
