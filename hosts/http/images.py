"""Image files, sent as base64 or named by a path -> PIL images in mode RGB."""

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
"""A usual progressive JPEG has 10; each further one decodes the whole image again."""
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})
"""Second bytes of JPEG markers that no segment follows; 0 is a byte of the image."""


class Unreadable(ValueError):
    """A value is not what it should be. The message says what it is instead."""


class UnreadableImage(Unreadable):
    """The bytes are no image of an allowed format, damaged, or too large."""


class NotBase64(Unreadable):
    """The field is not the base64 text it should be."""


def from_text(
    text: object, allowed_dirs: Iterable[Path | str], limits: DecodeLimits
) -> Image.Image:
    """The image of base64 text, or of a path inside one of the folders, upright and in the mode of
    its file.

    LocalAI writes the image of its caller to a temporary file on the same machine and sends the
    name. Raises UnreadableImage or NotBase64.
    """
    if is_path(text):
        return open_file(read_allowed_file(text, allowed_dirs, limits), limits)
    return open_file(bytes_from_text(without_data_header(text), limits), limits)


def is_path(text: object) -> bool:
    """Whether the text is a path: it begins with "/", but not with "/9j/", as the base64 of every
    JPEG does.
    """
    return isinstance(text, str) and text.startswith("/") and not text.startswith("/9j/")


def without_data_header(text: object) -> object:
    """Return `text` after "data:image/png;base64,", if it begins so. Raises NotBase64."""
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
    """Whether the first bytes are those of a PNG, JPEG or WebP file."""
    head = bytes(data[:12])
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (
        head[:4] == b"RIFF" and head[8:] == b"WEBP"
    )


def from_file_bytes(data: bytes | memoryview, limits: DecodeLimits) -> Image.Image:
    """The first frame of a PNG, JPEG or WebP file as RGB, upright. Raises UnreadableImage."""
    return as_rgb(open_file(data, limits))


def open_file(data: bytes | memoryview, limits: DecodeLimits) -> Image.Image:
    """The first frame of a PNG, JPEG or WebP file, upright and in the mode of the file."""
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
    except Image.DecompressionBombError as error:  # PIL's own bound, met while the header is read
        raise UnreadableImage(f"the image has more than {limits.max_pixels} pixels") from error
    except Exception as error:  # a dozen types on damaged files, SyntaxError among them
        raise UnreadableImage(
            "the image file is damaged or of a kind that cannot be read"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB: alpha is dropped, and 16 bits of grey become 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def as_mask(image: Image.Image, *, changes: Literal["opaque", "transparent"]) -> Image.Image:
    """The mask in mode RGB, white where the image may change: those parts of the alpha channel
    where it has one that is not full, else the white parts of the image.
    """
    if not image.has_transparency_data:
        return as_rgb(image)
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        return as_rgb(image)
    return (alpha if changes == "opaque" else ImageOps.invert(alpha)).convert("RGB")


def _num_scans(data: bytes) -> int:
    """Scans of the first image of a JPEG file. Phones append videos to it, which do not count."""
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
