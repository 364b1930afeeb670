"""An error is found if it comes whatever is unknown, and only then."""

import ast
from textwrap import dedent

import pytest

from backends.files.source.interpreter import Interpreter, RaisedError
from backends.files.source.values import UNKNOWN

RAISES = {
    "a condition that is met": "if size % 8 != 0: raise ValueError(f'{size} is odd')",
    "either of two, one unknown": "if other or size == 60: raise ValueError(ODD)",
    "an assertion": "assert size == 64, f'{size} is odd'",
    "a loop": "for each in [size, 64]:\n  if each != 64: raise ValueError(f'{each} is odd')",
    "after what does not matter": "made = self.encode(size)\nif size > 8: raise ValueError(ODD)",
    "another method": "self.check_size(size)",
    "a computed value": "half = size // 2\nhalf += 30\nif half == 60: raise ValueError(ODD)",
    "a comprehension": "if any(each == 60 for each in (size, other)): raise ValueError(ODD)",
}  # fmt: skip
PASSES = {
    "a condition that is not met": "if size % 6 != 0: raise ValueError",
    "an unknown value": "if other > 3: raise ValueError",
    "both of two, one unknown": "if size == 60 and other: raise ValueError",
    "what an unknown branch sets": "if other: size = 64\nif size == 60: raise ValueError",
    "an early end": "if other: return\nraise ValueError",
    "a list that a method changes": (
        "all = [size]\nall.append(6)\nif len(all) == 1: raise ValueError"
    ),
    "a list that is changed under another name": (
        "all = [size]\nsame = all\nsame.append(64)\nif len(all) == 1: raise ValueError"
    ),
    "an attribute that was set": "self.side = other\nif self.side == 8: raise ValueError",
    "an attribute that a call may set": "if self.hidden == 8: raise ValueError",
    "an error that is caught": "try:\n  raise ValueError\nexcept ValueError: pass",
    "what cannot be computed": "if size + 'x' == 3: raise ValueError",
    "a huge power": "if 10 ** 10 ** 10 > size: raise ValueError",
    "a huge text": "if len('x' * 10 ** 10) > size: raise ValueError",
}


def follow(body):
    source = "def run(self, size, other):\n" + "\n".join(f"  {line}" for line in body.split("\n"))
    source += dedent("""
        def check_size(self, value):
          if value != 64: raise ValueError(f"{value} is odd")
    """)
    methods = {each.name: each for each in ast.parse(source).body}
    given = {"size": 60, "other": UNKNOWN}
    Interpreter(methods, {"side": 8}, {"ODD": "60 is odd"}).follow("run", given)


@pytest.mark.parametrize("body", RAISES.values(), ids=RAISES)
def test_an_error_that_comes_in_any_case_is_found(body):
    with pytest.raises(RaisedError, match="60 is odd") as raised:
        follow(body)
    assert "size" in raised.value.sources


@pytest.mark.parametrize("body", PASSES.values(), ids=PASSES)
def test_an_error_that_may_not_come_is_none(body):
    follow(body)
