"""Image files and paths of them that the codec must refuse."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from hosts.compat import codec
from hosts.compat.codec import DecodeLimits
from tests.hosts.compat.forge import encoded
from tests.hosts.compat.refusal import refusal

ROOT = Path(__file__).resolve().parents[3]


def png(width: int, height: int, *, idat: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", idat)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [6000, 60_000])
def test_image_file_that_unfolds_to_too_many_pixels_is_refused(side):
    assert "more than 25165824 pixels" in refusal(codec.decode_image, encoded(png(side, side)))


def test_damaged_image_files_are_refused():
    for data in (
        png(4, 4, idat=zlib.compress(b"")),
        b"\xff\xd8\xff\xe0junk",
        b"RIFF\x10\0\0\0WEBPVP8 junk",
        png(0, 0),
    ):
        assert "damaged or of a kind that cannot be read" in refusal(
            codec.decode_image, encoded(data)
        )


def test_jpeg_with_thousands_of_scans_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert "more than 32 scans" in refusal(
        codec.decode_image, encoded(data[:-2] + last_scan * 2000 + data[-2:])
    )


@pytest.fixture
def folder(tmp_path):
    allowed = tmp_path / "images"
    allowed.mkdir()
    Image.new("RGB", (2, 2)).save(allowed / "inside.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    (tmp_path / "images-of-others").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images-of-others" / "outside.png")
    return allowed


def path_refusal(path, allowed_dirs, **options) -> str:
    return refusal(codec.decode_image_or_path, str(path), allowed_dirs=allowed_dirs, **options)


def test_path_outside_is_refused_alike_whether_or_not_it_exists(folder):
    (folder / "link").symlink_to(folder.parent / "outside.png")
    (folder / "broken").symlink_to(folder.parent / "missing.png")
    paths = [
        folder.parent / "outside.png",
        folder.parent / "missing.png",
        folder.parent / "images-of-others" / "outside.png",
        f"{folder}/../outside.png",
        f"{folder}/../missing.png",
        folder / "link",
        folder / "broken",
        "/etc/passwd",
        "/",
    ]
    messages = {path_refusal(path, [folder]) for path in paths}
    assert len(messages) == 1
    message = messages.pop()
    assert "outside the folders that images are read from" in message
    assert str(folder) in message


def test_path_is_refused_where_none_is_allowed(folder):
    assert "reads no image files by path" in path_refusal(folder / "inside.png", [])


def test_path_inside_that_is_no_regular_file_is_refused(folder):
    os.mkfifo(folder / "pipe")
    for path in (folder / "missing.png", folder / "pipe", folder):
        assert "not a readable file" in path_refusal(path, [folder])


def test_file_inside_that_is_no_image_is_refused(folder):
    (folder / "notes.txt").write_text("secret")
    message = path_refusal(folder / "notes.txt", [folder])
    assert "not a PNG, JPEG or WebP image" in message
    assert "secret" not in message


def test_file_inside_that_holds_a_pickle_is_not_unpickled(folder):
    (folder / "a.png").write_bytes(pickle.dumps(Image.new("L", (1, 1))))
    assert "not a PNG, JPEG or WebP image" in path_refusal(folder / "a.png", [folder])


def test_file_larger_than_allowed_is_refused(folder):
    assert "bytes; allowed are 10" in path_refusal(
        folder / "inside.png", [folder], limits=DecodeLimits(max_encoded_bytes=10)
    )


@pytest.mark.parametrize("path", ["/a\0b", "/a\nb", "/" + "a" * 5000])
def test_text_that_can_be_no_path_is_refused(folder, path):
    assert "is not a path of a file in" in path_refusal(path, [folder])


def test_relative_path_is_not_a_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert "is not base64" in path_refusal("inside.png", [folder])


def test_image_for_which_there_is_no_memory_is_refused():
    script = (
        "import resource, sys\n"
        "from backends.errors import RequestError\n"
        "from hosts.compat import codec\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 20 * 2**20,) * 2)\n"
        "try:\n"
        "    codec.decode_image(sys.stdin.read(), field='image')\n"
        "except RequestError as error:\n"
        "    print(error)\n"
    )
    file = io.BytesIO()
    Image.new("L", (5000, 5000)).save(file, "PNG")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        input=encoded(file.getvalue()),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "too large for this machine's memory" in done.stdout, done.stderr
