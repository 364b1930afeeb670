"""The base64(pickle) fields of the existing clients <-> plain objects (HTTP_CONTRACT 2.7), eras A
and B.

Pure functions. Called by the compat routes with one field at a time; nothing received is executed,
and each failure is a RequestError naming the field.
"""

import base64
import binascii
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from backends.errors import RequestError
from hosts.compat import images, tensors
from hosts.compat.limits import DecodeLimits
from hosts.compat.unpickle import ImageNode, MalformedPickle, PickleReader, TensorNode

__all__ = [
    "Conditioning",
    "DecodeLimits",
    "decode_conditioning",
    "decode_image",
    "decode_image_or_path",
    "decode_tensor",
    "encode_conditioning",
    "encode_frames",
    "encode_image",
    "encode_latents",
]

T = TypeVar("T")

_PROTOCOL = 4  # the newest that every client's Python reads
_LONGEST_DATA_HEADER = 100
_DEFAULT_LIMITS = DecodeLimits()

_IMAGE_WANTED = "Send base64 of a PNG, JPEG or WebP file, or base64 of a pickled PIL image"
_TENSOR_WANTED = "Send base64 of a pickled CPU torch tensor"
_CONDITIONING_WANTED = 'Send base64 of a pickled list [[tensor, {"pooled_output": tensor or None}]]'


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """Prompt embeds that a client computed itself."""

    embeds: np.ndarray
    """float32 [1, T, D]: T tokens of D channels"""
    pooled: np.ndarray | None
    """float32 [1, P], for the model types that take one"""


def decode_image(
    text: object, *, field: str, limits: DecodeLimits = _DEFAULT_LIMITS
) -> Image.Image:
    """An encoded image as RGB.

    text: base64 of a pickled PIL image (modes L, LA, P, RGB, RGBA), or of a PNG, JPEG or WebP file,
    the latter also after `data:image/...;base64,`; which of them is seen from the content. Alpha is
    dropped, EXIF rotation applied. Raises RequestError.
    """
    return _decoded(lambda: _image_from_text(text, limits), field=field, wanted=_IMAGE_WANTED)


def decode_image_or_path(
    text: object,
    *,
    field: str,
    allowed_dirs: Iterable[Path | str],
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> Image.Image:
    """Like decode_image, but `text` may also be the absolute path of an image file inside one of
    `allowed_dirs`.

    LocalAI writes the image of its caller to a temporary file on the same machine and sends the
    name (contract 2.3). A text that begins with "/" is a path, except "/9j/", with which the base64
    of every JPEG begins. Outside the folders the message does not tell whether the file exists.
    Raises RequestError.
    """
    if not isinstance(text, str) or not text.startswith("/") or text.startswith("/9j/"):
        return decode_image(text, field=field, limits=limits)

    def read() -> Image.Image:
        return images.from_file_bytes(images.read_allowed_file(text, allowed_dirs, limits), limits)

    return _decoded(read, field=field, wanted=_IMAGE_WANTED)


def decode_tensor(
    text: object, *, field: str, limits: DecodeLimits = _DEFAULT_LIMITS
) -> np.ndarray:
    """A pickled torch tensor (or Parameter) of floats or integers, from any device: float32,
    contiguous, finite, not empty.

    Raises RequestError.
    """

    def read() -> np.ndarray:
        node = _value_from_text(text, limits)
        if type(node) is not TensorNode:
            raise MalformedPickle("the pickle holds something other than a tensor")
        return tensors.to_array(node, limits)

    return _decoded(read, field=field, wanted=_TENSOR_WANTED)


def decode_conditioning(
    text: object, *, field: str, limits: DecodeLimits = _DEFAULT_LIMITS
) -> Conditioning:
    """The first pair of a ComfyUI conditioning list; other pairs, and keys other than
    pooled_output, are ignored.

    Raises RequestError, also when an ignored part holds an object of any other class.
    """

    def read() -> Conditioning:
        embeds, options = _first_pair(_value_from_text(text, limits))
        pooled = options.get("pooled_output")
        return Conditioning(
            embeds=_shaped(embeds, "the conditioning's tensor", dims=3, limits=limits),
            pooled=None
            if pooled is None
            else _shaped(pooled, "pooled_output", dims=2, limits=limits),
        )

    return _decoded(read, field=field, wanted=_CONDITIONING_WANTED)


def encode_image(image: Image.Image) -> str:
    """One image as the clients unpickle it: RGB, no subclass, no metadata."""
    return _encoded(_plain(image))


def encode_frames(frames: Sequence[Image.Image]) -> str:
    """The frames of a video: a list of at least one RGB image, all of one size, which the clients
    stack.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(
            f"Frames must be at least one and of one size; given {len(frames)} of sizes "
            f"{sorted(sizes)}."
        )
    return _encoded([_plain(frame) for frame in frames])


def encode_latents(latents: np.ndarray) -> str:
    """Latents [1, C, h, w] as a torch tensor: CPU, float32, contiguous, without gradient, so that
    no client needs CUDA.
    """
    import torch  # here, because the HTTP side must be importable without torch

    return _encoded(torch.tensor(np.ascontiguousarray(latents), dtype=torch.float32))


def encode_conditioning(embeds: np.ndarray, pooled: np.ndarray | None) -> str:
    """What decode_conditioning reads."""
    import torch  # as above

    options = {"pooled_output": torch.tensor(pooled) if pooled is not None else None}
    return _encoded([[torch.tensor(np.ascontiguousarray(embeds)), options]])


def _decoded(read: Callable[[], T], *, field: str, wanted: str) -> T:
    """The result of `read`, its refusals turned into a RequestError that says what to send
    instead.
    """
    try:
        return read()
    except (MalformedPickle, images.UnreadableImage, _NotBase64) as error:
        raise RequestError(f"{field}: {error}. {wanted}.", field=field) from error
    except MemoryError as error:
        raise RequestError(
            f"{field}: too large for this machine's memory. Send less data.", field=field
        ) from error


class _NotBase64(ValueError):
    """The field is not the base64 text it should be."""


def _image_from_text(text: object, limits: DecodeLimits) -> Image.Image:
    data = _bytes_from_text(_without_data_header(text), limits)
    if images.is_image_file(data):
        return images.from_file_bytes(data, limits)
    if data[:1] != b"\x80":
        raise MalformedPickle("the data is neither an image file of an allowed format nor a pickle")
    node = _value_from_bytes(data, limits)
    if type(node) is not ImageNode:
        raise MalformedPickle("the pickle holds something other than an image")
    return images.from_node(node, limits)


def _without_data_header(text: object) -> object:
    """`text` after "data:image/png;base64,", if it begins so."""
    if not isinstance(text, str) or text[:5].lower() != "data:":
        return text
    header, comma, _ = text[:_LONGEST_DATA_HEADER].partition(",")
    kind = header.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise _NotBase64("a data URL must begin with data:image/<format>;base64,")
    return text[len(header) + 1 :]


def _bytes_from_text(text: object, limits: DecodeLimits) -> bytes:
    if not isinstance(text, str):
        raise _NotBase64(f"the value must be base64 text, not JSON of type {type(text).__name__}")
    if len(text) > limits.max_encoded_bytes:
        raise _NotBase64(
            f"the text has {len(text)} characters; allowed are {limits.max_encoded_bytes}"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise _NotBase64(
            "the text is not base64 (standard alphabet, padded, no line breaks)"
        ) from error


def _value_from_text(text: object, limits: DecodeLimits) -> object:
    return _value_from_bytes(_bytes_from_text(text, limits), limits)


def _value_from_bytes(data: bytes, limits: DecodeLimits) -> object:
    value, length = PickleReader(memoryview(data), limits=limits).load()
    if length != len(data):
        raise MalformedPickle("the pickle is followed by other data")
    return value


def _first_pair(value: object) -> tuple[object, dict]:
    if type(value) is not list or not value:
        raise MalformedPickle("the conditioning is not a list of at least one pair")
    pair = value[0]
    if type(pair) not in (list, tuple) or len(pair) != 2 or type(pair[1]) is not dict:
        raise MalformedPickle("the conditioning's first entry is not a pair of a tensor and a dict")
    return pair[0], pair[1]


def _shaped(node: object, name: str, *, dims: int, limits: DecodeLimits) -> np.ndarray:
    if type(node) is not TensorNode:
        raise MalformedPickle(f"{name} is not a tensor")
    array = tensors.to_array(node, limits)
    if array.ndim != dims or array.shape[0] != 1:
        raise MalformedPickle(
            f"{name} has shape {list(array.shape)}; it must have {dims} dimensions, the first of "
            "length 1"
        )
    return array


def _plain(image: Image.Image) -> Image.Image:
    plain = image.convert("RGB")  # a copy of the base class in any case
    plain.info = {}
    return plain


def _encoded(value: object) -> str:
    return base64.b64encode(pickle.dumps(value, protocol=_PROTOCOL)).decode("ascii")
