"""Names, shapes and dtypes in a file of torch.save, without torch and without running its code.

Only the objects that make up a dictionary of tensors are built, and these as plain tuples: of every
other class a file names, nothing is looked up.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
LEGACY_PARTS = 3
"""Pickles before the content in files of torch before 1.6: magic number, version, system."""
DTYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
}
"""torch's name -> safetensors' name."""
STORAGES = {
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
    "UntypedStorage": "",
}


class ForeignObject(Exception):
    """A file holds more than a dictionary of tensors."""


class StoredTensor(NamedTuple):
    """What a file says about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # in safetensors' terms


def read_pickle_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; names in nested dictionaries are joined by dots.

    ForeignObject names a class that is not part of a dictionary of tensors.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                content = _Reader(file).load()
    else:
        with path.open("rb") as file:
            for _ in range(LEGACY_PARTS):
                _Reader(file).load()
            content = _Reader(file).load()
    if not isinstance(content, Mapping):
        raise ForeignObject(f"it holds a {type(content).__name__}, not a dictionary")
    return dict(_flat(content.get("state_dict", content)))


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of nested dictionaries: an IP-Adapter's pickle has one per part."""
    for name, value in content.items():
        if isinstance(value, StoredTensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        raise ForeignObject(f"it holds a {module}.{name}, which is never loaded")

    def persistent_load(self, pid: Any) -> str:
        """Return the dtype of a storage, whose content is elsewhere in the file."""
        return pid[1]


def _tensor(storage: str, _offset: int, size: Any, _stride: Any, *rest: Any) -> StoredTensor:
    """Stand for torch._utils._rebuild_tensor_v2 and _v3, whose last argument is the dtype."""
    dtype = storage or next((value for value in rest if isinstance(value, str)), "")
    return StoredTensor(shape=tuple(map(int, size)), dtype=dtype)


def _parameter(data: StoredTensor, *_rest: Any) -> StoredTensor:
    return data


class _Dictionary(dict):
    """A state_dict has attributes."""


_BUILDERS = {
    ("collections", "OrderedDict"): partial(_Dictionary),
    ("torch._utils", "_rebuild_tensor"): partial(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): partial(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): partial(_tensor),
    ("torch._utils", "_rebuild_parameter"): partial(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): partial(_parameter),
}
"""What a file names -> what is called instead: partials, because a file could change a class."""
