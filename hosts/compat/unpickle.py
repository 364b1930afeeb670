"""Read a pickle as data: build plain values and inert nodes, import nothing, call nothing.

The existing clients put pickles on the wire. Python's own Unpickler is not used to read them, not
even with a restricted `find_class`: a memo index can make it allocate gigabytes, BUILD can change
the classes it was allowed to find, and hashing a deeply nested key overflows the C stack. This
reader knows only the instructions that pickle protocols 2 to 5 emit for the images, tensors and
plain containers that these clients send. It turns each object into a node, which `images.py` or
`tensors.py` examines afterwards. Called by those two files and by `codec.py`.
"""

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass

from hosts.http.images import Unreadable
from hosts.http.limits import DecodeLimits

# bytes; longer text stays undecoded, because one wide character quadruples the size of a str
_LONGEST_TEXT = 4096
_LONGEST_NAME = 200  # bytes of a module or class name
_LONGEST_INTEGER = 16  # bytes; torch's magic number has 10
_ENCODE_CHUNK = 2**20  # bytes


class MalformedPickle(Unreadable):
    """The pickle is damaged, hostile, too large, or holds something that clients do not send."""


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A module and a name in it, as text. Nothing is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class ImageNode:
    """A PIL image: the list its __getstate__ made, unchecked; None until BUILD."""

    state: list | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StorageNode:
    """The bytes of a legacy torch storage file, unread."""

    data: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class TensorNode:
    """The arguments of torch._utils._rebuild_tensor_v2, unchecked."""

    args: tuple


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """What a torch storage file says about its storage."""

    value: object


@dataclass(frozen=True, slots=True, eq=False)
class LongText:
    """UTF-8 text too long for a name or a number; protocol 2 carries bytes this way."""

    data: memoryview


IMAGE_GLOBALS = frozenset(
    {
        GlobalName("PIL.Image", "Image"),
        GlobalName("PIL.PngImagePlugin", "PngImageFile"),
        GlobalName("PIL.JpegImagePlugin", "JpegImageFile"),
        GlobalName("PIL.WebPImagePlugin", "WebPImageFile"),
    }
)
_ENCODE = GlobalName("_codecs", "encode")
_ORDERED_DICT = GlobalName("collections", "OrderedDict")
_REBUILD_TENSOR = GlobalName("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = GlobalName("torch._utils", "_rebuild_parameter")
_LOAD_STORAGE = GlobalName("torch.storage", "_load_from_bytes")
_REBUILDERS = frozenset({_REBUILD_TENSOR, _REBUILD_PARAMETER, _LOAD_STORAGE})
REQUEST_GLOBALS = IMAGE_GLOBALS | _REBUILDERS | {_ENCODE, _ORDERED_DICT}

_NO_PERSISTENT_IDS = (
    "the pickle refers to objects outside itself; only images, tensors and plain values are allowed"
)


class PickleReader:
    """One pass over one pickle.

    `globals_allowed`: the names GLOBAL may mention. `persistent_ids`: whether BINPERSID is allowed
    (torch storage files only). Time and memory are bounded by the length of the data and `limits`.
    """

    def __init__(
        self,
        data: memoryview,
        *,
        limits: DecodeLimits,
        globals_allowed: frozenset[GlobalName] = REQUEST_GLOBALS,
        persistent_ids: bool = False,
    ) -> None:
        self._data = data
        self._limits = limits
        self._globals_allowed = globals_allowed
        self._persistent_ids = persistent_ids
        self._position = 0
        self._stack: list = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._encoded_left = limits.max_encoded_bytes

    def load(self) -> tuple[object, int]:
        """Return the value and the offset just after its STOP. Raises MalformedPickle."""
        try:
            if self._byte() != 0x80 or not 2 <= self._byte() <= 5:
                raise MalformedPickle("the data is not a pickle of protocol 2 to 5")
            value = self._run()
        except (IndexError, KeyError, UnicodeError, struct.error) as error:
            raise MalformedPickle("the pickle is damaged") from error
        _check_depth(value, self._limits.max_depth)
        return value, self._position

    def _run(self) -> object:
        for _ in range(self._limits.max_opcodes):
            opcode = self._byte()
            if opcode == 0x2E:  # STOP
                if len(self._stack) != 1 or self._marks:
                    raise MalformedPickle("the pickle is damaged: it ends with unfinished values")
                return self._stack[0]
            step = _STEPS.get(opcode)
            if step is None:
                raise MalformedPickle(
                    f"the pickle uses instruction 0x{opcode:02x}, which images and tensors do not "
                    "need"
                )
            step(self)
        raise MalformedPickle(f"the pickle has more than {self._limits.max_opcodes} instructions")

    # Reading

    def _take(self, count: int) -> memoryview:
        end = self._position + count
        if end > len(self._data):
            raise MalformedPickle("the pickle is cut short")
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def _byte(self) -> int:
        return self._take(1)[0]

    def _number(self, layout: str) -> int | float:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        window = bytes(self._data[self._position : self._position + _LONGEST_NAME])
        length = window.index(b"\n") if b"\n" in window else None
        if length is None:
            raise MalformedPickle("the pickle holds a class name that is too long")
        self._position += length + 1
        return window[:length].decode("utf-8")

    # Stack

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        self._check_above_mark(1)
        return self._stack.pop()

    def _top(self) -> object:
        self._check_above_mark(1)
        return self._stack[-1]

    def _check_above_mark(self, count: int) -> None:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - floor < count:
            raise MalformedPickle("the pickle is damaged: a value is missing")

    def _mark(self) -> None:
        if len(self._marks) >= self._limits.max_depth:
            raise MalformedPickle(f"the pickle nests deeper than {self._limits.max_depth}")
        self._marks.append(len(self._stack))

    def _pop_to_mark(self) -> list:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # Scalars, text, bytes

    def _frame(self) -> None:
        if self._number("<Q") > len(self._data) - self._position:
            raise MalformedPickle("the pickle is cut short")

    def _integer(self) -> None:
        count = self._byte()
        if count > _LONGEST_INTEGER:
            raise MalformedPickle("the pickle holds an integer that is too large")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _text(self, layout: str) -> None:
        piece = self._take(self._number(layout))
        self._push(
            LongText(piece) if len(piece) > _LONGEST_TEXT else str(piece, "utf-8", "surrogatepass")
        )

    def _bytes(self, layout: str) -> None:
        self._push(self._take(self._number(layout)))

    # Containers

    def _tuple(self, count: int) -> None:
        self._check_above_mark(count)
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _append(self, items: list) -> None:
        target = self._top()
        if type(target) is not list:
            raise MalformedPickle("the pickle appends to something that is not a list")
        target.extend(items)

    def _set_items(self, items: list) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise MalformedPickle("the pickle stores items in something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # other hashes can be made to collide, or to recurse
                raise MalformedPickle("the pickle holds a dict with a key that is not short text")
            target[key] = value

    def _set_item(self) -> None:
        value = self._pop()
        self._set_items([self._pop(), value])

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    # Objects

    def _name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise MalformedPickle("the pickle names a class by something that is not text")
        found = GlobalName(module, name)
        if found not in self._globals_allowed:
            shown = str(found)[:_LONGEST_NAME]
            raise MalformedPickle(
                f"the pickle refers to {shown!r}; only images, tensors and plain values are allowed"
            )
        self._push(found)

    def _stack_global(self) -> None:
        name = self._pop()
        self._name(self._pop(), name)

    def _new_object(self) -> None:
        args, target = self._pop(), self._pop()
        # Types first: comparing or hashing a hostile nested value would recurse in C.
        is_image = type(target) is GlobalName and target in IMAGE_GLOBALS
        if not is_image or type(args) is not tuple or args:
            raise MalformedPickle("the pickle creates an object that is not an image")
        self._push(ImageNode())

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if type(target) is not ImageNode or target.state is not None or type(state) is not list:
            raise MalformedPickle("the pickle changes the state of what is not a new image")
        target.state = state

    def _reduce(self) -> None:
        args, target = self._pop(), self._pop()
        if type(target) is not GlobalName or type(args) is not tuple:
            raise MalformedPickle("the pickle calls something that is not a known function")
        self._push(self._call(target, args))

    def _call(self, target: GlobalName, args: tuple) -> object:
        """Return a node for the object that calling `target` would create."""
        kinds = tuple(type(arg) for arg in args)
        if target == _ENCODE and kinds in ((str, str), (LongText, str)) and args[1] == "latin1":
            return self._encode(args[0])
        if target == _ORDERED_DICT and not args:
            return {}
        if target == _LOAD_STORAGE and kinds == (memoryview,):
            return StorageNode(args[0])
        if target == _REBUILD_TENSOR:
            return TensorNode(args)
        if target == _REBUILD_PARAMETER and kinds == (TensorNode, bool, dict):
            return args[0]
        raise MalformedPickle(f"the pickle calls {target} with arguments it does not take")

    def _encode(self, text: str | LongText) -> memoryview:
        """Return the bytes that protocol 2 wrote as text with characters 0 to 255."""
        self._encoded_left -= len(
            text if type(text) is str else text.data
        )  # the memo can return the same text any number of times
        if self._encoded_left < 0:
            raise MalformedPickle(
                f"the pickle unfolds to more than {self._limits.max_encoded_bytes} bytes"
            )
        if type(text) is str:
            return memoryview(text.encode("latin1"))
        decoder = codecs.getincrementaldecoder("utf-8")()
        encoded = bytearray()
        for start in range(0, len(text.data), _ENCODE_CHUNK):
            chunk = bytes(text.data[start : start + _ENCODE_CHUNK])
            encoded += decoder.decode(chunk).encode("latin1")
        decoder.decode(b"", final=True)
        return memoryview(encoded)

    def _persistent_id(self) -> None:
        if not self._persistent_ids:
            raise MalformedPickle(_NO_PERSISTENT_IDS)
        self._push(PersistentId(self._pop()))


_STEPS: dict[int, Callable[[PickleReader], None]] = {
    0x95: PickleReader._frame,
    0x28: PickleReader._mark,
    ord("N"): lambda r: r._push(None),
    0x88: lambda r: r._push(True),
    0x89: lambda r: r._push(False),
    ord("J"): lambda r: r._push(r._number("<i")),
    ord("K"): lambda r: r._push(r._byte()),
    ord("M"): lambda r: r._push(r._number("<H")),
    0x8A: PickleReader._integer,
    ord("G"): lambda r: r._push(r._number(">d")),
    0x8C: lambda r: r._text("<B"),
    ord("X"): lambda r: r._text("<I"),
    0x8D: lambda r: r._text("<Q"),
    ord("C"): lambda r: r._bytes("<B"),
    ord("B"): lambda r: r._bytes("<I"),
    0x8E: lambda r: r._bytes("<Q"),
    0x96: lambda r: r._bytes("<Q"),  # BYTEARRAY8
    ord("]"): lambda r: r._push([]),
    ord("a"): lambda r: r._append([r._pop()]),
    ord("e"): lambda r: r._append(r._pop_to_mark()),
    ord(")"): lambda r: r._push(()),
    ord("t"): lambda r: r._push(tuple(r._pop_to_mark())),
    0x85: lambda r: r._tuple(1),
    0x86: lambda r: r._tuple(2),
    0x87: lambda r: r._tuple(3),
    ord("}"): lambda r: r._push({}),
    ord("s"): PickleReader._set_item,
    ord("u"): lambda r: r._set_items(r._pop_to_mark()),
    0x94: lambda r: r._put(len(r._memo)),  # MEMOIZE
    ord("q"): lambda r: r._put(r._byte()),
    ord("r"): lambda r: r._put(r._number("<I")),
    ord("h"): lambda r: r._push(r._memo[r._byte()]),
    ord("j"): lambda r: r._push(r._memo[r._number("<I")]),
    ord("c"): lambda r: r._name(r._line(), r._line()),
    0x93: PickleReader._stack_global,
    0x81: PickleReader._new_object,
    ord("b"): PickleReader._build,
    ord("R"): PickleReader._reduce,
    ord("Q"): PickleReader._persistent_id,
}


def _children(value: object) -> list | tuple:
    match value:
        case list() | tuple():
            return value
        case dict():
            return list(value.values())
        case ImageNode():
            return (value.state,)
        case TensorNode():
            return value.args
        case _:
            return ()


def _check_depth(value: object, max_depth: int) -> None:
    """Raise MalformedPickle for containers nested too deeply.

    Each container is visited once, level by level, so shared or recursive values cost no more.
    """
    level, seen = [value], {id(value)}
    for _ in range(max_depth):
        following = []
        for child in (child for parent in level for child in _children(parent)):
            if id(child) not in seen:
                seen.add(id(child))
                following.append(child)
        if not following:
            return
        level = following
    raise MalformedPickle(f"the pickle nests deeper than {max_depth}")
