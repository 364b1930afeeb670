"""Builds pickles, honest and hostile, byte by byte or through __reduce__. Used by the codec
tests.
"""

import base64
import collections
import io
import pickle
import struct

import torch

PROTO = b"\x80\x04"


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pickled(value: object, protocol: int = 4) -> str:
    return encoded(pickle.dumps(value, protocol))


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def blob(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def storage_file(tensor: torch.Tensor) -> bytes:
    """What torch writes for a tensor's storage inside a pickle."""
    file = io.BytesIO()
    torch.save(tensor._typed_storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


STORAGE = storage_file(torch.arange(6.0))


def forged_tensor(
    *,
    storage=STORAGE,
    offset=0,
    size=(2, 3),
    stride=(3, 1),
    rest=(False, collections.OrderedDict()),
) -> Calls:
    """A tensor whose parts need not fit together; `storage` may be bytes or any object."""
    part = Calls(torch.storage._load_from_bytes, storage) if isinstance(storage, bytes) else storage
    return Calls(torch._utils._rebuild_tensor_v2, part, offset, size, stride, *rest)


def forged_image(state: object, module: str = "PIL.Image", attribute: str = "Image") -> bytes:
    return PROTO + name(module, attribute) + b")\x81" + pickle.dumps(state, 3)[2:-1] + b"b."


class _StorageId:
    def __init__(self, value) -> None:
        self.value = value


class _StoragePickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.value if isinstance(obj, _StorageId) else None


def _part(value: object) -> bytes:
    file = io.BytesIO()
    _StoragePickler(file, 2).dump(value)
    return file.getvalue()


def forged_storage(
    *,
    magic=0x1950A86A20F9469CFC6C,
    version=1001,
    system=None,
    kind="storage",
    storage_type=torch.FloatStorage,
    count=6,
    view=None,
    keys=("0",),
    written=6,
    raw=bytes(24),
) -> bytes:
    """A storage file whose header may lie."""
    system = {"protocol_version": 1001, "little_endian": True} if system is None else system
    storage = _StorageId((kind, storage_type, "0", "cpu", count, view))
    return (
        b"".join(map(_part, (magic, version, system, storage, list(keys))))
        + struct.pack("<q", written)
        + raw
    )
