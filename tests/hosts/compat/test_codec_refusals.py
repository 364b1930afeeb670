"""Everything the codec must refuse: with a RequestError that says why, with nothing executed, and
cheaply.
"""

import collections
import datetime
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from hosts.compat import codec
from hosts.compat.codec import DecodeLimits
from tests.hosts.compat.forge import (
    PROTO,
    STORAGE,
    Calls,
    encoded,
    forged_storage,
    forged_tensor,
    name,
    pickled,
    storage_file,
    text,
)
from tests.hosts.compat.refusal import refusal

LATIN1 = name("_codecs", "encode")
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
IMAGE = name("PIL.Image", "Image")
LOAD = name("torch.storage", "_load_from_bytes")
DECODERS = (codec.decode_image, codec.decode_tensor, codec.decode_conditioning)


HOSTILE = {
    "a shell command": (
        PROTO + name("os", "system") + text("touch pwned") + b"\x85R.",
        "refers to 'os.system'",
    ),
    "a name in protocol 2 form": (
        b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        "refers to 'builtins.eval'",
    ),
    "an attribute of an allowed module": (
        PROTO + name("PIL.Image", "open") + b".",
        "refers to 'PIL.Image.open'",
    ),
    "a dotted name": (
        PROTO + name("torch._utils", "_rebuild_tensor_v2.__globals__") + b".",
        "refers to",
    ),
    "a class name without end": (b"\x80\x04c" + b"a" * 1000, "class name that is too long"),
    "a class name that is a number": (
        PROTO + b"K\x01K\x02\x93.",
        "names a class by something that is not text",
    ),
    "an extension code": (PROTO + b"\x82\x01.", "instruction 0x82"),
    "an extension code of four bytes": (PROTO + b"\x84\x01\x00\x00\x00.", "instruction 0x84"),
    "an instance instruction": (PROTO + b"(ios\nsystem\n.", "instruction 0x69"),
    "an object instruction": (PROTO + b"(" + IMAGE + b"o.", "instruction 0x6f"),
    "a new object with keywords": (PROTO + IMAGE + b")}\x92.", "instruction 0x92"),
    "a persistent id": (PROTO + text("a") + b"Q.", "objects outside itself"),
    "a persistent id as text": (PROTO + b"Pabc\n.", "instruction 0x50"),
    "an out-of-band buffer": (PROTO + b"\x97.", "instruction 0x97"),
    "a decimal of any length": (PROTO + b"I" + b"9" * 5000 + b"\n.", "instruction 0x49"),
    "a long integer of any length": (
        PROTO + b"\x8b" + struct.pack("<i", 10**6) + bytes(10**6) + b".",
        "instruction 0x8b",
    ),
    "a long integer of 200 bytes": (
        PROTO + b"\x8a\xc8" + bytes(200) + b".",
        "integer that is too large",
    ),
    "a set": (PROTO + b"\x8f.", "instruction 0x8f"),
    "protocol 0": (b"\x80\x00N.", "not a pickle of protocol 2 to 5"),
    "protocol 6": (b"\x80\x06N.", "not a pickle of protocol 2 to 5"),
    "bytes longer than the data": (PROTO + b"\x8e" + struct.pack("<Q", 2**62) + b".", "cut short"),
    "a byte array longer than the data": (
        PROTO + b"\x96" + struct.pack("<Q", 2**40) + b".",
        "cut short",
    ),
    "text longer than the data": (PROTO + b"X" + struct.pack("<I", 2**32 - 1) + b".", "cut short"),
    "a frame longer than the data": (
        PROTO + b"\x95" + struct.pack("<Q", 2**63) + b"N.",
        "cut short",
    ),
    "a memo entry never written": (PROTO + b"j" + struct.pack("<I", 2**32 - 1) + b".", "damaged"),
    "text that is not UTF-8": (PROTO + b"\x8c\x01\xff.", "damaged"),
    "a mark never set": (PROTO + b"t.", "damaged"),
    "a value from below the mark": (PROTO + b"N(0\x85.", "instruction 0x30"),
    "a tuple from below the mark": (PROTO + b"N(\x85.", "a value is missing"),
    "a call without arguments": (PROTO + b"R.", "a value is missing"),
    "an end with two values": (PROTO + b"NN.", "unfinished values"),
    "an end with an open mark": (PROTO + b"N(.", "a value is missing|unfinished values"),
    "data after the end": (PROTO + b"N.N", "followed by other data"),
    "an append to a tuple": (PROTO + b")Na.", "not a list"),
    "items of a list": (PROTO + b"]NNs.", "not a dict"),
    "an odd number of items": (PROTO + b"}(Nu.", "not a dict"),
    "a dict key that is a number": (PROTO + b"}K\x01Ns.", "key that is not short text"),
    "a dict key that is a nested tuple": (
        PROTO + b"})" + b"\x85" * 50_000 + b"Ns.",
        "key that is not short text",
    ),
    "a dict key of long text": (
        PROTO + b"}X" + struct.pack("<I", 5000) + b"a" * 5000 + b"Ns.",
        "key that is not short text",
    ),
    "a call of a number": (PROTO + b"K\x01)R.", "not a known function"),
    "a call with a list": (PROTO + REBUILD + b"]R.", "not a known function"),
    "a call of an image class": (PROTO + IMAGE + b")R.", "arguments it does not take"),
    "an encoding other than latin1": (
        PROTO + LATIN1 + text("a") + text("zip") + b"\x86R.",
        "arguments it does not take",
    ),
    "latin1 text beyond 255": (
        PROTO + LATIN1 + text("\u20ac") + text("latin1") + b"\x86R.",
        "damaged",
    ),
    "long latin1 text cut within a character": (
        PROTO
        + LATIN1
        + b"X"
        + struct.pack("<I", 5001)
        + b"a" * 5000
        + b"\xc3"
        + text("latin1")
        + b"\x86R.",
        "damaged",
    ),
    "a dict filled by its constructor": (
        PROTO + name("collections", "OrderedDict") + b"]\x85R.",
        "arguments it does not take",
    ),
    "a storage made of text": (PROTO + LOAD + text("x") + b"\x85R.", "arguments it does not take"),
    "a parameter of something else": (
        PROTO + name("torch._utils", "_rebuild_parameter") + b"N\x88}\x87R.",
        "arguments it does not take",
    ),
    "a new object of a function": (
        PROTO + REBUILD + b")\x81.",
        "creates an object that is not an image",
    ),
    "a new object of a nested tuple": (
        PROTO + b")" + b"\x85" * 50_000 + b")\x81.",
        "creates an object that is not an image",
    ),
    "a new image with arguments": (
        PROTO + IMAGE + b"N\x85\x81.",
        "creates an object that is not an image",
    ),
    "the state of a class": (PROTO + IMAGE + b"}b.", "changes the state"),
    "the state of a function": (
        PROTO + REBUILD + b"}" + text("__defaults__") + b"Nsb.",
        "changes the state",
    ),
    "a state twice": (PROTO + IMAGE + b")\x81]b]b.", "changes the state"),
    "a state that is a dict": (PROTO + IMAGE + b")\x81}b.", "changes the state"),
    "tuples nested 50,000 deep": (PROTO + b")" + b"\x85" * 50_000 + b".", "nests deeper than 32"),
    "lists nested 50,000 deep": (
        PROTO + b"]" * 50_000 + b"a" * 49_999 + b".",
        "nests deeper than 32",
    ),
    "marks nested 50,000 deep": (PROTO + b"(" * 50_000, "nests deeper than 32"),
    "images nested 10,000 deep": (
        PROTO + (IMAGE + b")\x81](") * 3 + (b"(" * 40),
        "nests deeper than 32",
    ),
    "more instructions than allowed": (
        PROTO + b"]" + b"Na" * 60_000 + b".",
        "more than 100000 instructions",
    ),
    "an empty pickle": (PROTO, "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickle_is_refused_by_every_decoder(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, reason = HOSTILE[case]
    for decode in DECODERS:
        message = refusal(decode, encoded(data))
        assert any(part in message for part in reason.split("|")), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2020, 1, 1),
        {1, 2},
        np.ones(2),
        torch.ones(2).to_sparse(),
        torch.device("cpu"),
        1j,
    ],
)
def test_objects_of_other_classes_are_refused_wherever_they_are(value):
    for protocol in (2, 4):
        assert "latent: the pickle " in refusal(codec.decode_tensor, pickled(value, protocol))
        pair = [torch.ones(1, 2, 3), {"control": value}]
        assert "latent: the pickle " in refusal(
            codec.decode_conditioning, pickled([pair], protocol)
        )


def test_command_in_a_pickled_object_is_not_run(tmp_path):
    target = tmp_path / "pwned"
    for value in (
        Calls(os.system, f"touch {target}"),
        [Calls(open, str(target), "w")],
        {"a": Calls(eval, "1/0")},
    ):
        for decode in DECODERS:
            assert "only images, tensors and plain values are allowed" in refusal(
                decode, pickled(value)
            )
    assert not target.exists()


def test_memo_index_of_four_billion_costs_nothing():
    """Python's own unpickler would allocate 64 GiB for this."""
    data = PROTO + b"Nr" + struct.pack("<I", 2**32 - 1) + b"."
    assert "something other than a tensor" in refusal(codec.decode_tensor, encoded(data))


def test_text_encoded_again_and_again_is_refused():
    long_text = b"X" + struct.pack("<I", 200_000) + b"a" * 200_000 + b"\x94"
    call = LATIN1 + b"h\x00" + text("latin1") + b"\x86R"
    data = PROTO + b"](" + long_text + call * 20 + b"e."
    limits = DecodeLimits(max_encoded_bytes=1_000_000)
    assert "unfolds to more than 1000000 bytes" in refusal(
        codec.decode_tensor, encoded(data), limits=limits
    )


def test_list_that_contains_itself_is_refused_quickly():
    loop = []
    loop.append(loop)
    assert "pair" in refusal(codec.decode_conditioning, pickled(loop))
    loop[:] = [[loop, {"pooled_output": loop}]]
    assert "the conditioning's tensor is not a tensor" in refusal(
        codec.decode_conditioning, pickled(loop)
    )


def test_value_shared_a_billion_times_is_walked_once():
    value = []
    for _ in range(30):
        value = [value, value]
    assert "nests deeper than 16" in refusal(
        codec.decode_conditioning, pickled(value), limits=DecodeLimits(max_depth=16)
    )
    assert "pair" in refusal(
        codec.decode_conditioning, pickled(value), limits=DecodeLimits(max_depth=64)
    )


TENSORS = {
    "beyond the storage": ({"size": (7,), "stride": (1,)}, "reaches beyond its 6 stored elements"),
    "beyond the storage by its offset": ({"offset": 1}, "reaches beyond"),
    "beyond the storage by its stride": ({"stride": (4, 1)}, "reaches beyond"),
    "beyond any address": ({"stride": (2**47, 1)}, "reaches beyond"),
    "a negative offset": ({"offset": -1}, "storage or offset is damaged"),
    "an offset beyond 64 bits": ({"offset": 2**70}, "storage or offset is damaged"),
    "an offset that is a bool": ({"offset": True}, "storage or offset is damaged"),
    "a negative stride": ({"stride": (-3, 1), "offset": 3}, "size and stride must be"),
    "a negative size": ({"size": (-2, -3)}, "size and stride must be"),
    "a size that is a list": ({"size": [2, 3]}, "size and stride must be"),
    "a size of text": ({"size": ("2", 3)}, "size and stride must be"),
    "a size of nine dimensions": (
        {"size": (1,) * 9, "stride": (1,) * 9},
        "size and stride must be",
    ),
    "a size longer than its stride": ({"size": (2, 3, 1)}, "differ in length"),
    "no elements": ({"size": (0, 3)}, "has 0 elements"),
    "a huge repetition of one element": ({"size": (2**30,), "stride": (0,)}, "allowed are 1 to"),
    "a size whose product is huge": (
        {"size": (2**40,) * 8, "stride": (0,) * 8},
        "allowed are 1 to",
    ),
    "a negated view": ({"rest": (False, {}, {"neg": True})}, "conjugated or negated view"),
    "too few parts": ({"rest": ()}, "six parts"),
    "no storage": ({"storage": 5}, "storage or offset is damaged"),
    "NaN": ({"storage": storage_file(torch.full((6,), torch.nan))}, "NaN or infinity"),
    "infinity": (
        {"storage": storage_file(torch.full((6,), torch.inf, dtype=torch.bfloat16))},
        "NaN or infinity",
    ),
    "values beyond float32": (
        {"storage": storage_file(torch.full((6,), 1e300, dtype=torch.float64))},
        "values beyond float32",
    ),
    "another magic number": (
        {"storage": forged_storage(magic=7)},
        "not in the form that torch pickles",
    ),
    "another version": (
        {"storage": forged_storage(version=1000)},
        "not in the form that torch pickles",
    ),
    "a big-endian machine": (
        {"storage": forged_storage(system={"little_endian": False})},
        "big-endian",
    ),
    "a system that is no dict": ({"storage": forged_storage(system=[])}, "big-endian"),
    "a module instead of a storage": (
        {"storage": forged_storage(kind="module")},
        "not in the form that torch pickles",
    ),
    "a type that is no storage": (
        {"storage": forged_storage(storage_type=torch.Tensor)},
        "refers to 'torch.Tensor",
    ),
    "a complex storage": (
        {"storage": storage_file(torch.ones(6, dtype=torch.complex64))},
        "refers to 'torch.ComplexFloatStorage'",
    ),
    "a storage view": (
        {"storage": forged_storage(view=("1", 0, 6))},
        "not in the form that torch pickles",
    ),
    "two storages": ({"storage": forged_storage(keys=("0", "1"))}, "exactly one block"),
    "another storage's key": ({"storage": forged_storage(keys=("1",))}, "exactly one block"),
    "a count of terabytes": (
        {"storage": forged_storage(count=2**40, written=2**40)},
        "announces 1099511627776 elements",
    ),
    "a negative count": (
        {"storage": forged_storage(count=-1, written=-1)},
        "not in the form that torch pickles",
    ),
    "two different counts": ({"storage": forged_storage(written=5)}, "announces 6 elements"),
    "missing elements": ({"storage": forged_storage(raw=bytes(20))}, "holds 20 bytes"),
    "extra elements": ({"storage": forged_storage(raw=bytes(28))}, "holds 28 bytes"),
    "a storage without its end": ({"storage": STORAGE[:100]}, "cut short"),
    "a storage of no bytes": ({"storage": b""}, "cut short"),
    "a storage of a command": ({"storage": pickle.dumps(Calls(os.system, "true"), 2)}, "refers to"),
    "a pickled image as storage": (
        {"storage": pickle.dumps(Image.new("L", (1, 1)), 2)},
        "refers to 'PIL.Image.Image'",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_that_does_not_fit_together_is_refused(case):
    parts, reason = TENSORS[case]
    forged = forged_tensor(**parts)
    assert reason in refusal(codec.decode_tensor, pickled(forged))
    assert reason in refusal(
        codec.decode_conditioning, pickled([[torch.ones(1, 2, 3), {"pooled_output": forged}]])
    )


def test_honest_forged_tensor_is_read():
    """Otherwise the refusals above could have another cause."""
    for storage in (STORAGE, forged_storage()):
        assert codec.decode_tensor(
            pickled(forged_tensor(storage=storage)), field="latent"
        ).shape == (2, 3)


def test_zip_archive_of_torch_save_is_refused():
    file = io.BytesIO()
    torch.save(torch.zeros(10), file)
    assert "not a pickle" in refusal(
        codec.decode_tensor, pickled(forged_tensor(storage=file.getvalue()))
    )
    assert "not a pickle" in refusal(codec.decode_tensor, encoded(file.getvalue()))


def test_tensor_with_more_elements_than_allowed_is_refused():
    limits = DecodeLimits(max_tensor_elements=10)
    assert "has 11 elements; allowed are 1 to 10" in refusal(
        codec.decode_tensor, pickled(torch.ones(11)), limits=limits
    )
    assert codec.decode_tensor(pickled(torch.ones(10)), field="latent", limits=limits).shape == (
        10,
    )


@pytest.mark.parametrize("value", [None, 5, ["iVBOR"], {"a": 1}, True])
def test_value_that_is_not_text_is_refused(value):
    for decode in DECODERS:
        assert "must be base64 text, not JSON of type" in refusal(decode, value)


@pytest.mark.parametrize("value", ["gASV\n", "gAR", "\u00e9", "====", "a b c", "/work\u0000"])
def test_text_that_is_not_base64_is_refused(value):
    for decode in DECODERS:
        assert "is not base64 (standard alphabet, padded, no line breaks)" in refusal(decode, value)


def test_text_longer_than_allowed_is_refused_before_it_is_decoded():
    limits = DecodeLimits(max_encoded_bytes=100)
    assert "has 104 characters; allowed are 100" in refusal(
        codec.decode_tensor, "A" * 104, limits=limits
    )


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_limits_must_be_positive_integers(value):
    with pytest.raises(ValueError, match=r"DecodeLimits.max_depth=.* Give a positive integer"):
        DecodeLimits(max_depth=value)


def test_text_of_wide_characters_stays_within_the_size_of_the_data():
    """One emoji would make a str of 100,000 letters four times as large; it is not decoded at
    all.
    """
    long_text = "\U0001f600" + "a" * 100_000
    assert "something other than a tensor" in refusal(codec.decode_tensor, pickled(long_text))
    pair = [torch.ones(1, 2, 3), collections.OrderedDict(prompt=long_text)]
    assert codec.decode_conditioning(pickled([pair]), field="latent").embeds.shape == (1, 2, 3)
