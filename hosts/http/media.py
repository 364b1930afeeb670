"""Encodes results: images as PNG, JPEG or WebP, videos as MP4 or GIF, both as arrays. No torch."""

import base64
import io
import math
import tempfile
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from backends.errors import RequestError
from backends.request import Audio, GenerateResult
from hosts.http.images import Unreadable
from hosts.http.limits import DecodeLimits
from hosts.jobs import serialization

IMAGE_TYPES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "jpg": "image/jpeg", "webp": "image/webp"}
"""Names that clients have for IMAGE_TYPES."""
VIDEO_TYPES = ("video/mp4", "image/gif")
ARRAY_TYPE = "application/x-npy"
"""uint8 (N, H, W, 3) as numpy.save writes it: all frames without loss, for programs."""
WHOLE_TYPE = "application/x-npz"
"""The complete result as numpy.savez writes it: `frames`, `latents` if the type has them, and
`facts` (JSON as bytes).
"""
EXTENSIONS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "video/mp4": "mp4",
    "image/gif": "gif",
    ARRAY_TYPE: "npy",
    WHOLE_TYPE: "npz",
}
MAX_DIMS = 8
"""Of an array in a request."""
QUALITY = 95
"""Default quality of JPEG and WebP files."""
FRAMES_PER_S = 7
"""Speed of videos that say none: that at which both existing clients play them."""


def content_types(output: str) -> tuple[str, ...]:
    """Return the content types of a result of this kind ('image' or 'video'), the best first."""
    return (*(IMAGE_TYPES if output == "image" else VIDEO_TYPES), ARRAY_TYPE, WHOLE_TYPE)


def images(result: GenerateResult) -> list[Image.Image]:
    """Return the frames as RGB images, or as RGBA ones."""
    return [Image.fromarray(frame) for frame in result.frames]


def each_image(result: GenerateResult, output: str) -> list[GenerateResult]:
    """Return a result of its own for each image, of which some classes make several in one call.
    A video is one.
    """
    if output == "video":
        return [result]
    return [replace(result, frames=frame[None]) for frame in result.frames]


def encode(
    result: GenerateResult,
    content_type: str,
    *,
    metadata: str = "",
    frames_per_s: float | None = None,
    quality: int = QUALITY,
) -> bytes:
    """Return the result as one file of this type. RequestError if the type does not fit.

    A PNG holds `metadata` as its text `parameters`. quality: of JPEG and WebP, 0 to 100.
    frames_per_s: None takes the speed that the result was generated for.
    """
    frames_per_s = frames_per_s or result.resolved.get("fps") or FRAMES_PER_S
    if content_type == ARRAY_TYPE:
        return _encode_array(result)
    if content_type == WHOLE_TYPE:
        return _encode_whole(result)
    if content_type in IMAGE_TYPES and len(result.frames) == 1:
        return _encode_image(images(result)[0], IMAGE_TYPES[content_type], metadata, quality)
    if content_type == "image/gif":
        return _encode_gif(images(result), frames_per_s)
    if content_type == "video/mp4":
        return _encode_mp4(result, frames_per_s)
    allowed = ", ".join((*VIDEO_TYPES, ARRAY_TYPE, WHOLE_TYPE))
    raise RequestError(
        f"Accept: {content_type} does not fit a video. Allowed: {allowed}, application/json.",
        field="Accept",
    )


def as_json(
    result: GenerateResult, output: str, *, frames_per_s: float | None = None
) -> dict[str, Any]:
    """Return the result as JSON. `output` is base64 of the best file type, `latents` of a .npy
    file. `outputs` are all images, if one call made several.
    """
    content_type = content_types(output)[0]
    files = [
        encode(each, content_type, frames_per_s=frames_per_s) for each in each_image(result, output)
    ]
    texts = [base64.b64encode(data).decode("ascii") for data in files]
    body: dict[str, Any] = {
        "message": "OK",
        "output": texts[0],
        "content_type": content_type,
        "is_image": output == "image",
    }
    if len(texts) > 1:
        body["outputs"] = texts
    if result.latents is not None:
        body["latents"] = npy(result.latents)
    return body


def npy(array: np.ndarray) -> str:
    """Return base64 of the array's .npy file, the form in which requests send arrays."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def png(image: Image.Image) -> str:
    """Return base64 of the image as a PNG file, so that no pixel changes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_npy(data: bytes, limits: DecodeLimits) -> np.ndarray:
    """Return the values of a .npy file as a finite, non-empty float32 array. Raises Unreadable.

    The header is checked before memory is allocated.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise Unreadable("version")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise Unreadable("the data is not a .npy file") from error
    if dtype.kind not in "fiu" or len(shape) > MAX_DIMS:
        raise Unreadable(f"the array has type {dtype} and {len(shape)} dimensions")
    count = math.prod(shape)
    if not 1 <= count <= limits.max_tensor_elements:
        raise Unreadable(
            f"the array of shape {shape} has {count} elements; allowed are 1 to "
            f"{limits.max_tensor_elements}"
        )
    body = data[file.tell() :]
    if len(body) != count * dtype.itemsize:
        raise Unreadable(f"the array of shape {shape} does not have the bytes that it announces")
    with np.errstate(over="ignore"):  # values beyond float32 are refused below
        values = np.frombuffer(body, dtype).astype(np.float32)
    if not np.isfinite(values).all():
        raise Unreadable("the array holds NaN or infinity, or values beyond float32")
    return np.ascontiguousarray(values.reshape(shape, order="F" if is_fortran else "C"))


def _encode_array(result: GenerateResult) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, result.frames, allow_pickle=False)
    return buffer.getvalue()


def _encode_whole(result: GenerateResult) -> bytes:
    facts, arrays = serialization.pack_result(result)
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.frombuffer(facts.encode(), np.uint8), **arrays)
    return buffer.getvalue()


def decode_whole(data: bytes) -> GenerateResult:
    """Read a result that was sent as WHOLE_TYPE. Nothing is unpickled.

    ValueError, OSError or KeyError for anything else.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return serialization.unpack_result(arrays["facts"].tobytes().decode(), arrays.__getitem__)


def _encode_image(image: Image.Image, file_format: str, metadata: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if file_format == "PNG":
        texts = PngInfo()
        if metadata:
            texts.add_itxt("parameters", metadata)
        image.save(buffer, format=file_format, pnginfo=texts)
    else:
        kept = image.convert("RGB") if file_format == "JPEG" else image
        kept.save(buffer, format=file_format, quality=quality)
    return buffer.getvalue()


def _encode_gif(frames: list[Image.Image], frames_per_s: float) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / frames_per_s),
        loop=0,
    )
    return buffer.getvalue()


def _encode_mp4(result: GenerateResult, frames_per_s: float) -> bytes:
    import imageio.v3  # here: an extra that only MP4 needs

    height, width = (
        result.frames.shape[1] // 2 * 2,
        result.frames.shape[2] // 2 * 2,
    )  # H.264 needs even sides
    with tempfile.TemporaryDirectory() as folder:
        sound = _sound_file(result.audio, Path(folder)) if result.audio is not None else {}
        return imageio.v3.imwrite(
            "<bytes>",
            result.frames[:, :height, :width],
            extension=".mp4",
            plugin="FFMPEG",
            fps=frames_per_s,
            codec="libx264",
            macro_block_size=1,
            **sound,
        )


def _sound_file(audio: Audio, folder: Path) -> dict[str, str]:
    """Write the sound as 16-bit WAV, and return the encoder's arguments for it."""
    path = folder / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(audio.samples))
        file.setsampwidth(2)
        file.setframerate(audio.sampling_rate)
        file.writeframes((audio.samples.T * 32767).round().astype("<i2").tobytes())
    return {"audio_path": str(path), "audio_codec": "aac"}
