"""Encodings that the ComfyUI nodes import: pickles of images and tensors as base64 text.

This file must work alone: the nodes import it as a sub-package of theirs, without the rest of the
project, and copy every public name into their own modules. Each function returns None for None.
"""

import base64
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from PIL import Image

__all__ = [
    "convert_b64_to_nhwc_tensor",
    "convert_image_to_hwc_tensor",
    "convert_tensor_to_b64",
    "decode_b64_and_unpickle",
    "pickle_and_encode_b64",
]

_PROTOCOL = 4
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def pickle_and_encode_b64(obj: Any) -> str | None:
    """Return base64 of the object's pickle, ASCII without line breaks."""
    if obj is None:
        return None
    return base64.b64encode(pickle.dumps(obj, protocol=_PROTOCOL)).decode("ascii")


def decode_b64_and_unpickle(text: str | None) -> Any:
    """Return the object of an encoded pickle. Tensors arrive on the CPU.

    Images, tensors, numbers, text, and lists, tuples and dicts of them are allowed. Raises
    pickle.UnpicklingError for any other class: a host sends none, and unpickling one could run
    foreign code.
    """
    if text is None:
        return None
    return _Unpickler(io.BytesIO(base64.b64decode(text, validate=True))).load()


def convert_tensor_to_b64(t: torch.Tensor | None) -> str | None:
    """Return a float tensor [H, W, C] (or [1, H, W, C]) in [0, 1] as an encoded PIL image.

    C is 1, 3 or 4.
    """
    if t is None:
        return None
    if t.ndim == 4 and t.shape[0] == 1:
        t = t[0]
    if t.ndim != 3 or t.shape[2] not in _MODES:
        raise ValueError(
            f"The image has shape {list(t.shape)}. Give [height, width, channels] with 1, 3 or 4 "
            "channels."
        )
    height, width, channels = t.shape
    # Rounded, not truncated: k / 255 * 255 may fall just below k, and an image must survive the way
    # there and back.
    pixels = (
        t.detach()
        .to("cpu", torch.float32)
        .clamp(0, 1)
        .mul(255)
        .round()
        .to(torch.uint8)
        .contiguous()
    )
    return pickle_and_encode_b64(
        Image.frombytes(_MODES[channels], (width, height), pixels.numpy().tobytes())
    )


def convert_b64_to_nhwc_tensor(text: str | None) -> torch.Tensor | None:
    """Return an encoded PIL image as a float32 tensor [1, H, W, C] in [0, 1]."""
    if text is None:
        return None
    return convert_image_to_hwc_tensor(decode_b64_and_unpickle(text)).unsqueeze(0)


def convert_image_to_hwc_tensor(img: Image.Image | None) -> torch.Tensor | None:
    """Return a PIL image as a float32 tensor [H, W, C] in [0, 1].

    L has one channel, RGBA four; all other modes are converted to RGB.
    """
    if img is None:
        return None
    if img.mode not in _MODES.values():
        img = img.convert("RGB")
    pixels = torch.frombuffer(bytearray(img.tobytes()), dtype=torch.uint8)
    return pixels.reshape(img.height, img.width, -1).to(torch.float32) / 255


def _load_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(
            f"The pickle encodes text as {encoding!r}; only latin1 is allowed."
        )
    return text.encode("latin1")


class _Callable:
    """A function that a pickle may call but not change.

    BUILD sets attributes of whatever find_class returns.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("The pickle changes a function.")


_ALLOWED = {
    ("PIL.Image", "Image"): Image.Image,
    # A file's image comes back as a plain one: the bytes are in the pickle, the file is not.
    ("PIL.PngImagePlugin", "PngImageFile"): Image.Image,
    ("PIL.JpegImagePlugin", "JpegImageFile"): Image.Image,
    ("PIL.WebPImagePlugin", "WebPImageFile"): Image.Image,
    ("_codecs", "encode"): _Callable(_encode),
    ("collections", "OrderedDict"): _Callable(OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Callable(torch._utils._rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Callable(_load_storage),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(
                f"The pickle refers to {module}.{name}; only images, tensors and plain values are "
                "allowed."
            )
        return found
