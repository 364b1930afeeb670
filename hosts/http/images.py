"""Decodes image files, sent as base64 or named by a path, to PIL images in mode RGB."""

import base64
import binascii
import io
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from hosts.http.limits import DecodeLimits

FORMATS = ("PNG", "JPEG", "WEBP")
_LONGEST_DATA_HEADER = 100
_MAX_JPEG_SCANS = 32
"""A usual progressive JPEG has 10 scans. Each one decodes the whole image again."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
"""Second bytes of JPEG markers without a segment; 0 is image data."""


class Unreadable(ValueError):
    """A value has the wrong form. The message says what it is."""


class UnreadableImage(Unreadable):
    """The bytes are damaged, too large, or not an image of an allowed format."""


class NotBase64(Unreadable):
    """The field is not base64 text."""


def from_text(
    text: object, allowed_dirs: Iterable[Path | str], limits: DecodeLimits
) -> Image.Image:
    """Return the image of base64 text, or of a path inside an allowed folder.

    It is upright and in the mode of the file. LocalAI writes its caller's image to a temporary file
    on the same machine and sends the path. Raises UnreadableImage or NotBase64.
    """
    if is_path(text):
        return open_file(read_allowed_file(text, allowed_dirs, limits), limits)
    return open_file(bytes_from_text(without_data_header(text), limits), limits)


def is_path(text: object) -> bool:
    """Whether the text is a path. It starts with "/", but not with "/9j/" as a base64 JPEG does."""
    return isinstance(text, str) and text.startswith("/") and not text.startswith("/9j/")


def without_data_header(text: object) -> object:
    """Return `text` without a "data:image/png;base64," prefix. Raises NotBase64."""
    if not isinstance(text, str) or text[:5].lower() != "data:":
        return text
    header, comma, _ = text[:_LONGEST_DATA_HEADER].partition(",")
    kind = header.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise NotBase64("a data URL must begin with data:image/<format>;base64,")
    return text[len(header) + 1 :]


def bytes_from_text(text: object, limits: DecodeLimits) -> bytes:
    """Return the bytes of base64 text. Raises NotBase64."""
    if not isinstance(text, str):
        raise NotBase64(f"the value must be base64 text, not JSON of type {type(text).__name__}")
    if len(text) > limits.max_encoded_bytes:
        raise NotBase64(
            f"the text has {len(text)} characters; allowed are {limits.max_encoded_bytes}"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise NotBase64(
            "the text is not base64 (standard alphabet, padded, no line breaks)"
        ) from error


def is_image_file(data: bytes | memoryview) -> bool:
    """Whether the data starts like a PNG, JPEG or WebP file."""
    head = bytes(data[:12])
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (
        head[:4] == b"RIFF" and head[8:] == b"WEBP"
    )


def from_file_bytes(data: bytes | memoryview, limits: DecodeLimits) -> Image.Image:
    """Return the first frame of a PNG, JPEG or WebP file, RGB and upright. Raises
    UnreadableImage.
    """
    return as_rgb(open_file(data, limits))


def open_file(data: bytes | memoryview, limits: DecodeLimits) -> Image.Image:
    """Return the first frame of a PNG, JPEG or WebP file, upright, in the mode of the file."""
    if not is_image_file(data):
        raise UnreadableImage("the data is not a PNG, JPEG or WebP image")
    if bytes(data[:3]) == b"\xff\xd8\xff" and _num_scans(bytes(data)) > _MAX_JPEG_SCANS:
        raise UnreadableImage(f"the JPEG has more than {_MAX_JPEG_SCANS} scans")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:  # before any pixel is decoded
                raise UnreadableImage(
                    f"the image of {image.width}x{image.height} has more than {limits.max_pixels} "
                    "pixels"
                )
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image.copy()
    except (UnreadableImage, MemoryError):
        raise
    except (
        Image.DecompressionBombError
    ) as error:  # PIL's own limit, reached while it reads the header
        raise UnreadableImage(f"the image has more than {limits.max_pixels} pixels") from error
    except Exception as error:  # a dozen types on damaged files, SyntaxError among them
        raise UnreadableImage(
            "the image file is damaged or of a kind that cannot be read"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB: alpha is dropped, 16-bit grey becomes 8-bit."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def as_mask(image: Image.Image, *, changes: Literal["opaque", "transparent"]) -> Image.Image:
    """Return the mask in mode RGB, white where the image may change.

    An alpha channel decides unless it is fully opaque; otherwise the white parts of the image do.
    """
    transparent = transparent_parts(image)
    if transparent is None:
        return as_rgb(image)
    return ImageOps.invert(transparent) if changes == "opaque" else transparent


def transparent_parts(image: Image.Image) -> Image.Image | None:
    """Return a mask in mode RGB, white where the image is transparent; None if it is opaque."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return ImageOps.invert(alpha).convert("RGB") if alpha.getextrema()[0] < 255 else None


def _num_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG's first image.

    Phones append videos, which do not count.
    """
    position, scans = 2, 0
    while 0 <= (position := data.find(b"\xff", position)) < len(data) - 3:
        marker = data[position + 1]
        if marker == _END_OF_IMAGE or scans > _MAX_JPEG_SCANS:
            break
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        scans += marker == _START_OF_SCAN
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
    return scans


def read_allowed_file(path: str, allowed_dirs: Iterable[Path | str], limits: DecodeLimits) -> bytes:
    """Return the contents of a regular file inside one of the folders, after resolving symbolic
    links.

    Raises UnreadableImage. Outside the folders the message is the same whether or not the file
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
        raise UnreadableImage(f"the path is not a readable file in {allowed}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(f"the path is not a readable file in {allowed}")
        if status.st_size > limits.max_encoded_bytes:
            raise UnreadableImage(
                f"the file has {status.st_size} bytes; allowed are {limits.max_encoded_bytes}"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limits.max_encoded_bytes)
    finally:
        os.close(descriptor)
