"""Names, shapes and metadata of weight files, from their headers alone. Imports no torch."""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.files.pickle_header import PICKLES, ForeignObject, read_pickle_header

SAFETENSORS = (".safetensors", ".sft")
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""
GGUF = ".gguf"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Prefix of GGUF metadata with the shape of a tensor that is stored as rows of 256."""

HEADER_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    EOFError,
    StopIteration,
    RecursionError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""Exceptions of damaged files."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors that a weight file lists."""

    shapes: Mapping[str, Shape]  # by name, in torch's order
    dtypes: Mapping[str, str] = field(default_factory=dict)  # by name, in the format's terms
    metadata: Mapping[str, str] = field(default_factory=dict)  # text values only

    def has(self, *names: str) -> bool:
        """Return whether one of these tensors exists."""
        return any(name in self.shapes for name in names)

    def has_part(self, *parts: str) -> bool:
        """Return whether a tensor's name contains one of these texts."""
        return any(part in name for name in self.shapes for part in parts)

    def shape_of(self, *names: str) -> Shape | None:
        """Return the shape of the first of these tensors that exists."""
        return next((self.shapes[name] for name in names if name in self.shapes), None)

    def first_shape(self, *endings: str) -> Shape | None:
        """Return the shape of the first tensor whose name ends in one of these texts."""
        return next((shape for name, shape in self.shapes.items() if name.endswith(endings)), None)

    def without(self, *prefixes: str) -> "Header":
        """Return the tensors with the first prefix that occurs, their names without it.

        If no prefix occurs, return the header itself.
        """
        for prefix in prefixes:
            named = {
                name: name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)
            }
            if named:
                shapes = {short: self.shapes[name] for name, short in named.items()}
                dtypes = {
                    short: self.dtypes[name] for name, short in named.items() if name in self.dtypes
                }
                return Header(shapes=shapes, dtypes=dtypes, metadata=self.metadata)
        return self


def read_header(path: str | Path, *, option: str) -> Header | None:
    """Return the header of a file of weights; None for other files, and for the outline of a pickle
    that is not downloaded yet (backends/hub/cache.py).

    ConfigError names the option.
    """
    path = Path(path)
    try:
        if path.suffix in (*SAFETENSORS, *PICKLES, GGUF):
            _refuse_text(path)
        if path.suffix in SAFETENSORS:
            return _safetensors(path)
        if path.suffix in PICKLES:
            return _pickle(path) if not _is_empty(path) else None
        if path.suffix == GGUF:
            return _gguf(path)
        if option != "--checkpoint":  # of which files are refused in other words
            _require_pickle(path)
        return None
    except ImportError:
        return None
    except ForeignObject as error:
        raise ConfigError(
            f"{option}={path} cannot be read: {error}. Give a .safetensors file; code in a file "
            "is never run."
        ) from error
    except HEADER_ERRORS as error:
        kind = path.suffix.removeprefix(".")
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{option}={path} cannot be read ({kind}): {reason}. The file is damaged or "
            "incomplete: download it again."
        ) from error


def _require_pickle(path: Path) -> None:
    """ValueError if a file does not begin as torch's pickles do, of today and of before."""
    with path.open("rb") as file:
        if not file.read(4).startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError("it holds no weights of a known format")


def read_folder_header(
    folder: str | Path, *, option: str, variant: str | None = None
) -> Header | None:
    """Return the header of all weight files in a component's folder; None if none can be read.

    variant: 'fp16' reads files such as diffusion_pytorch_model.fp16.safetensors instead of plain
    ones.
    """
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
    found = [read_header(file, option=option) for file in _of_variant(files, variant)]
    headers = [header for header in found if header is not None]
    if not headers:
        return None
    return Header(
        shapes={name: shape for header in headers for name, shape in header.shapes.items()},
        dtypes={name: dtype for header in headers for name, dtype in header.dtypes.items()},
        metadata={key: value for header in headers for key, value in header.metadata.items()},
    )


def _of_variant(files: list[Path], variant: str | None) -> list[Path]:
    """Return the files of a variant. Names with two dots have one: model.fp16.safetensors."""
    plain = [file for file in files if file.name.count(".") == 1]
    marked = [file for file in files if file.name.count(".") > 1]
    wanted = [
        file
        for file in marked
        if variant is not None and file.name.split(".")[1].startswith(variant)
    ]
    return wanted or plain or marked


def _refuse_text(path: Path) -> None:
    """Raise ValueError for what a download may leave in place of a file."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.lstrip().startswith(b"<"):
        raise ValueError("it is a web page; the download may have needed a login")
    if start == b"version ":
        raise ValueError("it is a pointer of Git LFS; git lfs pull fetches the file itself")
    if not start:
        raise ValueError("it is empty")


def _safetensors(path: Path) -> Header:
    with path.open("rb") as file:
        size = path.stat().st_size
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header claims {length} bytes of a file of {size}")
        content = json.loads(file.read(length))
    metadata = content.pop("__metadata__", None) or {}
    end = 8 + length + max((int(entry["data_offsets"][1]) for entry in content.values()), default=0)
    if end > size:
        raise ValueError(f"its tensors end at byte {end} of a file of {size}")
    return Header(
        shapes={name: tuple(entry["shape"]) for name, entry in content.items()},
        dtypes={name: entry["dtype"] for name, entry in content.items()},
        metadata={str(key): str(value) for key, value in metadata.items()},
    )


def _is_empty(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == bytes(8)


def _pickle(path: Path) -> Header:
    tensors = read_pickle_header(path)
    return Header(
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
    )


def _gguf(path: Path) -> Header:
    """Read a GGUF header. Its shapes are reversed, those in its metadata are not."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    shapes = {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape))
        for tensor in reader.tensors
    }
    shapes |= {name: shape for name, shape in original_shapes(reader).items() if name in shapes}
    return Header(
        shapes=shapes,
        dtypes={tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
        metadata={
            key: text
            for key, entry in reader.fields.items()
            if isinstance(text := _value(entry), str)
        },
    )


def original_shapes(reader: Any) -> dict[str, Shape]:
    """Return the original shapes that a GGUF file gives for tensors stored as plain rows."""
    return {
        key.removeprefix(ORIGINAL_SHAPE): tuple(int(size) for size in _value(entry))
        for key, entry in reader.fields.items()
        if key.startswith(ORIGINAL_SHAPE)
    }


def _value(entry: Any) -> Any:
    """Return a metadata value; None for long arrays, such as a tokenizer's vocabulary."""
    return entry.contents() if len(entry.data) <= 8 else None


def has_other_names(shapes: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether so many names differ that they may be the original ones, which have to be
    converted. Some models' original names are mostly those of diffusers.
    """
    shared = len(wanted.keys() & shapes.keys())
    missing, unknown = len(wanted) - shared, len(shapes) - shared
    return shared * 2 < len(wanted) or min(missing, unknown) * 10 > len(wanted)


def require_same_shapes(
    given: str,
    shapes: Mapping[str, Sequence[int]],
    wanted: Mapping[str, Sequence[int]],
    advice: str,
) -> None:
    """Raise ConfigError that counts missing, unknown and wrong tensors, with the first of each."""
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in wanted]
    wrong = [
        f"{name} is {list(shapes[name])} and not {list(size)}"
        for name, size in wanted.items()
        if name in shapes and not _is_same_shape(shapes[name], size)
    ]
    problems = [
        _listed("is missing", "are missing", missing),
        _listed("is unknown", "are unknown", unknown),
        _listed("has", "have", wrong),
    ]
    if missing or unknown or wrong:
        raise ConfigError(
            f"{given} does not fit: {'; '.join(text for text in problems if text)}. {advice}"
        )


def _is_same_shape(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return whether the shapes are equal up to dims of size 1, or rows of 256 in GGUF files."""
    if [size for size in shape if size != 1] == [size for size in wanted if size != 1]:
        return True
    return len(shape) == 2 and shape[1] == 256 and math.prod(shape) == math.prod(wanted)


def _listed(one: str, several: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    if one == "has":
        return f"{len(names)} tensor{'s' if len(names) > 1 else ''} of another shape ({names[0]})"
    return (
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} "
        f"{several if len(names) > 1 else one} ({names[0]})"
    )
