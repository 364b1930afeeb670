"""Converts tensor nodes of a pickle to float32 arrays, without torch.

A tensor arrives as a legacy torch storage file (five small pickles, a count, the raw elements) and
as offset, size and stride into it. All of that is checked here and read with numpy.
torch.load(weights_only=True) reads the same files, but also zip archives, any storage size that the
header claims, and views beyond the storage; nothing received is passed to it.
"""

import math
from dataclasses import replace

import numpy as np

from hosts.compat.unpickle import (
    GlobalName,
    MalformedPickle,
    PersistentId,
    PickleReader,
    StorageNode,
    TensorNode,
)
from hosts.http.limits import DecodeLimits

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_MAX_HEADER_OPCODES = 64  # the five pickles take 6 to 29 each
_MAX_DIMS = 8

# numpy has no bfloat16: its 16 bits are the upper half of a float32
_BFLOAT16 = np.dtype("<u2")
_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": _BFLOAT16,
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
}
_STORAGE_GLOBALS = frozenset(GlobalName("torch", name) for name in _DTYPES)


def to_array(node: TensorNode, limits: DecodeLimits) -> np.ndarray:
    """Return the tensor's values: float32, contiguous, finite, not empty, owned by the caller.

    The sender's device, gradient and memory order are dropped. Raises MalformedPickle.
    """
    storage, offset, size, stride = _arguments(node)
    elements = _read_storage(storage, limits)
    count = math.prod(size)
    if not 1 <= count <= limits.max_tensor_elements:
        raise MalformedPickle(
            f"the tensor of size {size} has {count} elements; allowed are 1 to "
            f"{limits.max_tensor_elements}"
        )
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if last >= len(elements):
        raise MalformedPickle(
            f"the tensor of size {size} reaches beyond its {len(elements)} stored elements"
        )
    steps = tuple(step * elements.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(
        elements[offset:], shape=size, strides=steps, writeable=False
    )
    values = _widen(view)
    if not np.isfinite(values).all():
        raise MalformedPickle("the tensor holds NaN or infinity, or values beyond float32")
    return values


def _arguments(node: TensorNode) -> tuple[StorageNode, int, tuple[int, ...], tuple[int, ...]]:
    """Return the checked arguments of _rebuild_tensor_v2.

    The last three (gradient, hooks, flags) have no meaning here.
    """
    if len(node.args) not in (6, 7):
        raise MalformedPickle("the tensor does not have the six parts that torch writes")
    storage, offset, size, stride = node.args[:4]
    if type(storage) is not StorageNode or not _is_index(offset):
        raise MalformedPickle("the tensor's storage or offset is damaged")
    if len(node.args) == 7 and node.args[6] is not None:
        raise MalformedPickle(
            "the tensor is a conjugated or negated view; send tensor.resolve_neg().clone()"
        )
    for numbers in (size, stride):
        if (
            type(numbers) is not tuple
            or len(numbers) > _MAX_DIMS
            or not all(_is_index(number) for number in numbers)
        ):
            raise MalformedPickle(
                f"the tensor's size and stride must be up to {_MAX_DIMS} integers from 0"
            )
    if len(size) != len(stride):
        raise MalformedPickle("the tensor's size and stride differ in length")
    return storage, offset, size, stride


def _is_index(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**48


def _read_storage(node: StorageNode, limits: DecodeLimits) -> np.ndarray:
    """Return all elements of a storage file as a read-only 1-D view of the received bytes."""
    header_limits = replace(limits, max_opcodes=_MAX_HEADER_OPCODES)
    parts, position = [], 0
    for _ in range(5):
        reader = PickleReader(
            node.data[position:],
            limits=header_limits,
            globals_allowed=_STORAGE_GLOBALS,
            persistent_ids=True,
        )
        part, length = reader.load()
        parts.append(part)
        position += length
    magic, version, system, storage, keys = parts
    if (type(magic), magic, type(version), version) != (int, _MAGIC, int, _VERSION):
        raise MalformedPickle("the tensor's storage is not in the form that torch pickles")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise MalformedPickle(
            "the tensor was written on a big-endian machine; only little-endian data is read"
        )
    dtype, key, count = _storage_id(storage)
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
        raise MalformedPickle("the tensor's storage must hold exactly one block of elements")
    written = int.from_bytes(node.data[position : position + 8], "little", signed=True)
    raw = node.data[position + 8 :]
    if written != count or len(raw) != count * dtype.itemsize:
        raise MalformedPickle(
            f"the tensor's storage announces {count} elements but holds {len(raw)} bytes"
        )
    return np.frombuffer(raw, dtype=dtype)


def _storage_id(storage: object) -> tuple[np.dtype, str, int]:
    """Return dtype, key and element count of ("storage", type, key, device, count, None)."""
    parts = storage.value if type(storage) is PersistentId else None
    if type(parts) is not tuple or [type(part) for part in parts] != [
        str,
        GlobalName,
        str,
        str,
        int,
        type(None),
    ]:
        raise MalformedPickle("the tensor's storage is not in the form that torch pickles")
    kind, storage_type, key, _device, count, _view = parts
    if kind != "storage" or not _is_index(count):
        raise MalformedPickle("the tensor's storage is not in the form that torch pickles")
    return _DTYPES[storage_type.name], key, count


def _widen(view: np.ndarray) -> np.ndarray:
    if view.dtype == _BFLOAT16:
        return (view.astype(np.uint32, order="C") << 16).view(np.float32)
    with np.errstate(
        over="ignore"
    ):  # float64 beyond float32 becomes infinity, which the caller refuses
        return np.array(view, dtype=np.float32, order="C")
