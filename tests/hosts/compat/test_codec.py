"""What the codec reads and writes. Refusals are in test_codec_refusals.py, random input in
test_codec_fuzz.py.
"""

import base64
import io
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hosts.compat import codec
from tests.hosts.compat.forge import encoded, pickled

ROOT = Path(__file__).resolve().parents[3]
PROTOCOLS = (2, 3, 4, 5)
WIRE_GLOBALS = {
    "PIL.Image Image",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
    "collections OrderedDict",
}


def sample_image(mode="RGB", size=(7, 5)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(left: Image.Image, right: Image.Image) -> bool:
    return (left.mode, left.size, left.tobytes()) == (right.mode, right.size, right.tobytes())


def plainly(text: str) -> object:
    """What a client that knows nothing of us does."""
    return pickle.loads(base64.b64decode(text))


def globals_in(text: str) -> set[str]:
    """Every name the pickle refers to, as "module attribute"."""
    strings, found = [], set()
    for opcode, argument, _ in pickletools.genops(base64.b64decode(text)):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
        assert opcode.proto <= 4
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_pickled_image_of_every_mode_and_protocol_becomes_rgb(mode, protocol):
    image = sample_image(mode)
    assert same(codec.decode_image(pickled(image, protocol), field="image"), image.convert("RGB"))


def test_large_image_in_protocol_2_survives_the_detour_through_text():
    image = sample_image(size=(900, 700))  # its text is decoded in two chunks
    assert same(codec.decode_image(pickled(image, 2), field="image"), image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pickled_image_that_was_opened_from_a_file_is_read(kind):
    opened = Image.open(io.BytesIO(file_of(sample_image(), kind)))
    opened.load()
    assert same(codec.decode_image(pickled(opened), field="image"), opened.convert("RGB"))


@pytest.mark.parametrize("header", ["", "data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,"])
def test_base64_of_a_png_file_is_read(header):
    assert same(
        codec.decode_image(header + encoded(file_of(sample_image(), "PNG")), field="image"),
        sample_image(),
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})],
)
def test_base64_of_jpeg_and_webp_files_is_read(kind, options):
    data = file_of(sample_image(size=(64, 48)), kind, **options)
    assert same(
        codec.decode_image(encoded(data), field="image"),
        Image.open(io.BytesIO(data)).convert("RGB"),
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_image_file_of_any_mode_becomes_rgb(mode):
    image = (
        Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000)
        if mode == "I;16"
        else sample_image(mode)
    )
    decoded = codec.decode_image(encoded(file_of(image, "PNG")), field="image")
    assert (decoded.mode, decoded.size) == ("RGB", (7, 5))


def test_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(sample_image(size=(64, 32)), "JPEG", exif=exif)
    assert codec.decode_image(encoded(data), field="image").size == (32, 64)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8"],
)
def test_tensor_of_every_type_and_protocol_becomes_float32(dtype, protocol):
    tensor = torch.linspace(0, 90, 48).reshape(1, 4, 3, 4).to(getattr(torch, dtype))
    array = codec.decode_tensor(pickled(tensor, protocol), field="latent")
    assert (array.dtype, array.flags.c_contiguous, array.flags.writeable) == (
        np.float32,
        True,
        True,
    )
    np.testing.assert_array_equal(array, tensor.float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(1, 3),
        lambda t: t[:, 1:, ::2],
        lambda t: t[0, 0, 0, 0],
        lambda t: t[:, :1].expand(1, 5, 4, 5),
        lambda t: t.to(memory_format=torch.channels_last),
    ],
)
def test_view_of_a_tensor_arrives_contiguous_with_the_same_values(view, dtype):
    tensor = view(torch.randn(1, 3, 4, 5).to(dtype))
    array = codec.decode_tensor(pickled(tensor), field="latent")
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, tensor.float().numpy())


def test_parameter_is_read_as_its_tensor():
    array = codec.decode_tensor(pickled(torch.nn.Parameter(torch.arange(3.0))), field="sigmas")
    np.testing.assert_array_equal(array, [0, 1, 2])


def test_tensor_from_a_cuda_device_is_read_without_one():
    data = pickle.dumps(torch.arange(3.0), 4)
    location = b"X\x03\x00\x00\x00cpu"
    elsewhere = b"X\x06\x00\x00\x00cuda:0"
    assert data.count(location) == 1
    data = data.replace(location, elsewhere)
    length = (
        data.index(b"B") + 1
    )  # BINBYTES: the storage file grew by three bytes, and so did the frame
    grown = int.from_bytes(data[length : length + 4], "little") + 3
    frame = int.from_bytes(data[3:11], "little") + 3
    data = (
        data[:3]
        + frame.to_bytes(8, "little")
        + data[11:length]
        + grown.to_bytes(4, "little")
        + data[length + 4 :]
    )
    np.testing.assert_array_equal(codec.decode_tensor(encoded(data), field="latent"), [0, 1, 2])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_conditioning_takes_the_first_pair_and_ignores_other_keys(protocol):
    embeds, pooled = torch.randn(1, 77, 8).half(), torch.randn(1, 6)
    extra = {
        "guidance": 3.5,
        "mask": torch.ones(2),
        "area": (1, 2),
        "prompt": "x" * 5000,
        "none": None,
        "big": 2**40,
        "on": True,
    }
    value = [[embeds, {"pooled_output": pooled, **extra}], [torch.zeros(1, 1, 1), {}]]
    conditioning = codec.decode_conditioning(pickled(value, protocol), field="positive_embeds")
    np.testing.assert_array_equal(conditioning.embeds, embeds.float().numpy())
    np.testing.assert_array_equal(conditioning.pooled, pooled.numpy())


@pytest.mark.parametrize("options", [{}, {"pooled_output": None}])
def test_conditioning_without_pooled_output_has_none(options):
    pair = (torch.ones(1, 2, 3), options)
    assert codec.decode_conditioning(pickled([pair]), field="positive_embeds").pooled is None


def test_tensor_shared_within_a_conditioning_is_read_twice():
    pooled = torch.ones(1, 4)
    pair = [pooled[None], {"pooled_output": pooled}]
    conditioning = codec.decode_conditioning(pickled([pair]), field="positive_embeds")
    assert conditioning.embeds.shape == (1, 1, 4)
    assert conditioning.pooled.shape == (1, 4)


def test_image_is_sent_as_plain_rgb_without_metadata():
    image = sample_image("RGBA")
    image.info["secret"] = object()
    text = codec.encode_image(image)
    decoded = plainly(text)
    assert type(decoded) is Image.Image
    assert same(decoded, image.convert("RGB"))
    assert decoded.info == {}
    assert globals_in(text) <= WIRE_GLOBALS
    assert "secret" in image.info


def test_frames_are_sent_as_a_list_of_rgb_images():
    frames = [sample_image("RGBA"), sample_image("L"), sample_image()]
    text = codec.encode_frames(frames)
    decoded = plainly(text)
    assert type(decoded) is list
    assert all(same(got, sent.convert("RGB")) for got, sent in zip(decoded, frames, strict=True))
    assert globals_in(text) <= WIRE_GLOBALS


@pytest.mark.parametrize("frames", [[], [sample_image(), sample_image(size=(8, 8))]])
def test_frames_of_no_or_two_sizes_are_refused(frames):
    with pytest.raises(ValueError, match="at least one and of one size"):
        codec.encode_frames(frames)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_latents_are_sent_as_contiguous_float32_on_the_cpu(dtype):
    latents = np.random.default_rng(0).normal(size=(1, 6, 5, 4)).astype(dtype).transpose(0, 3, 2, 1)
    text = codec.encode_latents(latents)
    decoded = plainly(text)
    assert (decoded.device.type, decoded.dtype, decoded.is_contiguous(), decoded.requires_grad) == (
        "cpu",
        torch.float32,
        True,
        False,
    )
    assert decoded.untyped_storage().nbytes() == decoded.numel() * 4
    np.testing.assert_array_equal(decoded.numpy(), latents.astype(np.float32))
    assert globals_in(text) <= WIRE_GLOBALS


def test_latents_sent_and_received_again_are_the_same():
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        codec.decode_tensor(codec.encode_latents(latents), field="latent"), latents
    )


def test_decoding_needs_no_torch():
    """The HTTP side decodes, and must start within a second (nothing below may import torch)."""
    script = (
        "import sys\nfrom hosts.compat import codec\n"
        "codec.decode_tensor(sys.argv[1], field='f'); codec.decode_image(sys.argv[2], field='f')\n"
        "assert 'torch' not in sys.modules"
    )
    texts = [pickled(torch.ones(2)), pickled(sample_image())]
    subprocess.run([sys.executable, "-c", script, *texts], cwd=ROOT, check=True, timeout=60)


@pytest.fixture
def folder(tmp_path):
    """An allowed folder with an image that has no extension, as LocalAI writes it."""
    allowed = tmp_path / "images"
    allowed.mkdir()
    (allowed / "b64123").write_bytes(file_of(sample_image(), "PNG"))
    return allowed


def test_path_inside_an_allowed_folder_is_read_as_an_image(folder):
    decoded = codec.decode_image_or_path(
        str(folder / "b64123"), field="image", allowed_dirs=["/nowhere", folder]
    )
    assert same(decoded, sample_image())


def test_path_of_a_link_within_the_allowed_folder_is_read(folder):
    (folder / "link").symlink_to(folder / "b64123")
    assert same(
        codec.decode_image_or_path(str(folder / "link"), field="image", allowed_dirs=[folder]),
        sample_image(),
    )


def test_allowed_folder_may_itself_be_a_link(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    path = str(tmp_path / "alias" / "b64123")
    assert same(
        codec.decode_image_or_path(path, field="image", allowed_dirs=[tmp_path / "alias"]),
        sample_image(),
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_base64_is_still_read_where_paths_are_allowed(folder, kind):
    data = file_of(sample_image(), kind)
    decoded = codec.decode_image_or_path(encoded(data), field="image", allowed_dirs=[folder])
    assert same(decoded, Image.open(io.BytesIO(data)).convert("RGB"))
    assert codec.decode_image_or_path(
        pickled(sample_image()), field="image", allowed_dirs=[folder]
    ).size == (7, 5)
