"""Random damage and random malice: the codec answers with a value or a RequestError, executes
nothing, and stays small.

CODEC_FUZZ_EXAMPLES sets the number of examples of each test (default 150).
"""

import base64
import os
import pickle
import resource
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from backends.errors import RequestError
from hosts.compat import codec
from hosts.compat.codec import DecodeLimits
from tests.hosts.compat.forge import (
    PROTO,
    STORAGE,
    encoded,
    forged_image,
    forged_storage,
    forged_tensor,
    name,
)
from tests.hosts.compat.test_codec import file_of, sample_image

EXAMPLES = int(os.environ.get("CODEC_FUZZ_EXAMPLES", "150"))
LIMITS = DecodeLimits(
    max_encoded_bytes=2**20, max_pixels=2**16, max_tensor_elements=2**16, max_opcodes=5000
)
LONGEST_S = 2.0
LARGEST_GROWTH_MB = 300
HARMLESS = {"builtins.id", "array.__new__"}  # the latter: quantisation tables of a JPEG
FOLDER = "/nowhere-at-all"

fuzz = settings(
    max_examples=EXAMPLES,
    database=None,  # the suite leaves nothing behind
    deadline=None,  # measured below, around the decoding alone
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


class Watch:
    """An audit hook sees every import, file, process, socket, compilation and pickle lookup of the
    interpreter.
    """

    def __init__(self) -> None:
        self.watching: int | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        if self.watching != threading.get_ident() or event in HARMLESS:
            return
        if event == "import" and str(args[0]).startswith("PIL."):
            return  # PIL loads its readers when first needed
        self.seen.append(f"{event} {args!r:.200}")


WATCH = Watch()
sys.addaudithook(WATCH)


@pytest.fixture(scope="module", autouse=True)
def memory_stays_bounded():
    for data in CORPUS:
        survives(data)  # so that lazy imports and buffers are there before memory is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < LARGEST_GROWTH_MB


DECODERS = {
    "image": lambda text: codec.decode_image(text, field="f", limits=LIMITS),
    "path": lambda text: codec.decode_image_or_path(
        text, field="f", allowed_dirs=[FOLDER], limits=LIMITS
    ),
    "tensor": lambda text: codec.decode_tensor(text, field="f", limits=LIMITS),
    "conditioning": lambda text: codec.decode_conditioning(text, field="f", limits=LIMITS),
}


def survives(data: bytes) -> int:
    """Decode with everything; returns how many decoders accepted the data."""
    return survives_text(encoded(data))


def survives_text(text: str) -> int:
    accepted = 0
    for kind, decode in DECODERS.items():
        WATCH.seen.clear()
        start = time.thread_time()
        WATCH.watching = threading.get_ident()
        try:
            value = decode(text)
        except RequestError as error:
            assert error.field == "f"
            assert len(str(error)) < 1000
        else:
            accepted += 1
            check_value(kind, value)
        finally:
            WATCH.watching = None
        assert WATCH.seen == [], "decoding did something besides computing"
        assert time.thread_time() - start < LONGEST_S
    return accepted


def check_value(kind: str, value: object) -> None:
    arrays = {
        "tensor": [value],
        "conditioning": [getattr(value, "embeds", None), getattr(value, "pooled", None)],
    }.get(kind)
    if arrays is None:
        assert type(value) is Image.Image
        assert value.mode == "RGB"
        assert value.width * value.height <= LIMITS.max_pixels
        return
    for array in arrays:
        if array is not None:
            assert array.dtype == np.float32
            assert array.flags.c_contiguous
            assert 1 <= array.size <= LIMITS.max_tensor_elements
            assert np.isfinite(array).all()


def honest_pickles() -> list[bytes]:
    pooled = {"pooled_output": torch.ones(1, 3), "guidance": 3.5, "list": [1, None, "a"]}
    values = [
        *(sample_image(mode) for mode in ("L", "P", "RGB", "RGBA")),
        torch.arange(12.0).reshape(1, 3, 4).transpose(1, 2),
        torch.ones(3, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(2)),
        [[torch.ones(1, 2, 4), pooled]],
    ]
    return [pickle.dumps(value, protocol) for value in values for protocol in (2, 4, 5)]


PICKLES = honest_pickles()
FILES = [file_of(sample_image("RGB", (40, 30)), kind) for kind in ("PNG", "JPEG", "WEBP")]
FILES += [
    file_of(sample_image("P"), "PNG"),
    file_of(sample_image("RGB", (40, 30)), "JPEG", progressive=True),
]
CORPUS = PICKLES + FILES

INTERESTING = [bytes([opcode]) for opcode in range(256)] + [
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    name("os", "system"),
    name("torch._utils", "_rebuild_tensor_v2"),
    name("PIL.Image", "Image") + b")\x81",
]


@st.composite
def damaged(draw, corpus: list[bytes]) -> bytes:
    """Honest data with bytes replaced, removed, inserted, repeated, or the end cut off."""
    data = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        match draw(
            st.sampled_from(["flip", "replace", "insert", "remove", "repeat", "cut", "splice"])
        ):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "replace":
                piece = draw(st.sampled_from(INTERESTING))
                data[at : at + len(piece)] = piece
            case "insert":
                data[at:at] = draw(st.sampled_from(INTERESTING))
            case "remove":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[max(0, at - length) : at] * draw(st.integers(1, 40))
            case "cut":
                del data[at:]
            case "splice":
                other = draw(st.sampled_from(corpus))
                data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


@fuzz
@given(damaged(PICKLES))
def test_damaged_pickles_are_decoded_or_refused(data):
    survives(data)


@fuzz
@given(damaged(FILES))
def test_damaged_image_files_are_decoded_or_refused(data):
    survives(data)


NAMES = [
    name(*pair)
    for pair in [
        ("PIL.Image", "Image"),
        ("PIL.PngImagePlugin", "PngImageFile"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
    ]
]
HOSTILE_NAMES = [
    name("os", "system"),
    name("builtins", "eval"),
    name("torch", "load"),
    name("PIL.Image", "open"),
]
NUMBERS = [
    b"K\x00",
    b"K\x01",
    b"K\x03",
    b"J\xff\xff\xff\xff",
    b"M\xff\xff",
    b"\x8a\x05\x00\x00\x00\x00\x01",
    b"G" + bytes(8),
]
TEXTS = [
    b"\x8c\x06latin1",
    b"\x8c\x01a",
    b"\x8c\x03RGB",
    b"\x8c\x0dpooled_output",
    b"X\x88\x13\x00\x00" + b"a" * 5000,
]
BLOBS = [
    b"C\x03abc",
    b"B" + len(STORAGE).to_bytes(4, "little") + STORAGE,
    b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab",
]
MEMO = [b"\x94", b"q\x00", b"h\x00", b"h\x01", b"h\x02", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff"]
BUILD = [
    b"]",
    b"}",
    b")",
    b"(",
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"\x81",
    b"b",
    b"N",
    b"\x88",
    b"\x89",
]
REFUSED = [
    b"Q",
    b"\x82\x01",
    b"o",
    b"i",
    b"0",
    b"1",
    b"2",
    b"\x92",
    b"\x97",
    b"\x98",
    b"\x8f",
    b"\x91",
    b"\x95" + bytes(8),
]
instructions = st.one_of(
    *(st.sampled_from(group) for group in (NAMES, NUMBERS, TEXTS, BLOBS, MEMO, BUILD, BUILD, BUILD))
)
rarely_refused = st.integers(0, 40).flatmap(
    lambda n: st.sampled_from(REFUSED + HOSTILE_NAMES) if n == 0 else instructions
)


@fuzz
@given(st.lists(rarely_refused, max_size=60), st.integers(2, 5))
def test_random_programs_are_decoded_or_refused(program, protocol):
    survives(b"\x80" + bytes([protocol]) + b"".join(program) + b".")


@fuzz
@given(
    st.sampled_from(NAMES + HOSTILE_NAMES),
    st.lists(st.one_of(st.sampled_from(NUMBERS + TEXTS + BLOBS + NAMES)), max_size=8),
    st.data(),
)
def test_calls_with_random_arguments_are_decoded_or_refused(function, args, data):
    call = data.draw(st.sampled_from([b"R", b"\x81", b"b", b"\x81]b", b"\x81}b"]))
    wrap = data.draw(st.sampled_from([b".", b"\x85.", b"}\x86\x85."]))
    survives(PROTO + function + b"(" + b"".join(args) + b"t" + call + wrap)


numbers = st.one_of(
    st.integers(-3, 12),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([2**31, 2**40, 2**62, 2**100]),
)
shapes = st.one_of(
    st.lists(numbers, max_size=9).map(tuple),
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.none(),
    numbers,
)


@fuzz
@given(offset=numbers, size=shapes, stride=shapes)
def test_tensors_of_any_shape_read_only_their_own_storage(offset, size, stride):
    forged = forged_tensor(offset=offset, size=size, stride=stride)
    data = pickle.dumps(forged, 4)
    if survives(data):
        array = codec.decode_tensor(encoded(data), field="f")
        assert set(array.flatten()) <= set(range(6))


@fuzz
@given(
    count=numbers,
    written=st.integers(-(2**63), 2**63 - 1) | st.integers(0, 8),
    raw=st.binary(max_size=64),
    storage_type=st.sampled_from(
        [
            torch.FloatStorage,
            torch.BFloat16Storage,
            torch.DoubleStorage,
            torch.LongStorage,
            torch.Tensor,
        ]
    ),
    keys=st.lists(st.sampled_from(["0", "1", 0]), max_size=2),
    size=st.integers(0, 9),
)
def test_storages_that_lie_are_decoded_or_refused(count, written, raw, storage_type, keys, size):
    storage = forged_storage(
        count=count, written=written, raw=raw, storage_type=storage_type, keys=keys
    )
    survives(pickle.dumps(forged_tensor(storage=storage, size=(size,), stride=(1,)), 4))


@fuzz
@given(damaged([STORAGE, forged_storage()]))
def test_damaged_storages_are_decoded_or_refused(storage):
    survives(pickle.dumps(forged_tensor(storage=storage), 4))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@fuzz
@given(
    st.tuples(
        plain,
        st.sampled_from(["L", "P", "LA", "RGB", "RGBA", "F", "I;16"]) | plain,
        st.tuples(st.integers(-1, 5), st.integers(-1, 5)) | plain,
        st.none() | st.lists(st.integers(-1, 256), max_size=9) | plain,
        st.binary(max_size=80) | plain,
    )
)
def test_images_of_any_state_are_decoded_or_refused(state):
    survives(forged_image(list(state)))


@fuzz
@given(plain, st.integers(2, 5))
def test_plain_values_are_refused(value, protocol):
    assert survives(pickle.dumps(value, protocol)) == 0


@fuzz
@given(st.text(max_size=60) | st.text("/9j.iVBORw0KGgoAAAA+=:,data;bse64\x00", max_size=60))
def test_any_text_is_decoded_or_refused(text):
    survives_text(text)


def test_honest_data_is_accepted_by_its_own_decoder():
    """Otherwise everything above would pass with a codec that refuses all."""
    for data in PICKLES:
        assert survives(data) in (1, 2), base64.b64encode(data)
    for data in FILES:
        assert survives(data) == 2
