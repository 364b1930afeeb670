"""The base64(pickle) fields of the existing clients <-> plain objects (docs/compat.md).

Pure functions, which the compat routes call with one field at a time. Nothing received is executed.
Every failure is a RequestError that names the field.
"""

import base64
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hosts.compat import images, tensors
from hosts.compat.unpickle import ImageNode, MalformedPickle, PickleReader, TensorNode
from hosts.http.decode import decoded
from hosts.http.images import (
    bytes_from_text,
    from_file_bytes,
    from_text,
    is_image_file,
    is_path,
    without_data_header,
)
from hosts.http.limits import DecodeLimits

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

_PROTOCOL = 4  # the newest that every client's Python reads
_DEFAULT_LIMITS = DecodeLimits()

_IMAGE_WANTED = "Send base64 of a PNG, JPEG or WebP file, or base64 of a pickled PIL image"
_TENSOR_WANTED = "Send base64 of a pickled CPU torch tensor"
_CONDITIONING_WANTED = 'Send base64 of a pickled list [[tensor, {"pooled_output": tensor or None}]]'


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conditioning:
    """Prompt embeds that a client computed."""

    embeds: np.ndarray
    """float32 [1, T, D]: T tokens of D channels"""
    pooled: np.ndarray | None
    """float32 [1, P], for the model types that take one"""


def decode_image(
    text: object, *, field: str, limits: DecodeLimits = _DEFAULT_LIMITS
) -> Image.Image:
    """Return an encoded image as RGB. Alpha is dropped, EXIF rotation applied. Raises RequestError.

    text: base64 of a pickled PIL image (modes L, LA, P, RGB, RGBA) or of a PNG, JPEG or WebP file;
    the latter may follow `data:image/...;base64,`. The content tells which it is.
    """
    return decoded(lambda: _image_from_text(text, limits), field=field, wanted=_IMAGE_WANTED)


def decode_image_or_path(
    text: object,
    *,
    field: str,
    allowed_dirs: Iterable[Path | str],
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> Image.Image:
    """Like decode_image, but `text` may also be an absolute path inside one of `allowed_dirs`.

    Raises RequestError.
    """
    if not is_path(text):
        return decode_image(text, field=field, limits=limits)
    return decoded(lambda: from_text(text, allowed_dirs, limits), field=field, wanted=_IMAGE_WANTED)


def decode_tensor(
    text: object, *, field: str, limits: DecodeLimits = _DEFAULT_LIMITS
) -> np.ndarray:
    """Return a pickled torch tensor (or Parameter) as a finite, non-empty, contiguous float32
    array.

    It may hold floats or integers and come from any device. Raises RequestError.
    """

    def read() -> np.ndarray:
        node = _value_from_text(text, limits)
        if type(node) is not TensorNode:
            raise MalformedPickle("the pickle holds something other than a tensor")
        return tensors.to_array(node, limits)

    return decoded(read, field=field, wanted=_TENSOR_WANTED)


def decode_conditioning(
    text: object, *, field: str, limits: DecodeLimits = _DEFAULT_LIMITS
) -> Conditioning:
    """Return the first pair of a ComfyUI conditioning list.

    Other pairs and keys other than pooled_output are ignored. Raises RequestError, also if an
    ignored part holds an object of another class.
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

    return decoded(read, field=field, wanted=_CONDITIONING_WANTED)


def encode_image(image: Image.Image) -> str:
    """Return one image as the clients unpickle it: plain RGB without metadata."""
    return _encoded(_plain(image))


def encode_frames(frames: Sequence[Image.Image]) -> str:
    """Return the frames of a video: a list of one or more RGB images of one size.

    The clients stack them.
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(
            f"Frames must be at least one and of one size; given {len(frames)} of sizes "
            f"{sorted(sizes)}."
        )
    return _encoded([_plain(frame) for frame in frames])


def encode_latents(latents: np.ndarray) -> str:
    """Return latents [1, C, h, w] as a pickled torch tensor.

    It is on the CPU, float32, contiguous and without gradient, so that no client needs CUDA.
    """
    import torch  # here, because the HTTP side must be importable without torch

    return _encoded(torch.tensor(np.ascontiguousarray(latents), dtype=torch.float32))


def encode_conditioning(embeds: np.ndarray, pooled: np.ndarray | None) -> str:
    """Encode prompt embeds for decode_conditioning."""
    import torch  # as above

    options = {"pooled_output": torch.tensor(pooled) if pooled is not None else None}
    return _encoded([[torch.tensor(np.ascontiguousarray(embeds)), options]])


def _image_from_text(text: object, limits: DecodeLimits) -> Image.Image:
    data = bytes_from_text(without_data_header(text), limits)
    if is_image_file(data):
        return from_file_bytes(data, limits)
    if data[:1] != b"\x80":
        raise MalformedPickle("the data is neither an image file of an allowed format nor a pickle")
    node = _value_from_bytes(data, limits)
    if type(node) is not ImageNode:
        raise MalformedPickle("the pickle holds something other than an image")
    return images.from_node(node, limits)


def _value_from_text(text: object, limits: DecodeLimits) -> object:
    return _value_from_bytes(bytes_from_text(text, limits), limits)


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
