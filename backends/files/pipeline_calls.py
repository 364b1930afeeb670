"""What a pipeline class of diffusers takes and returns, read from its source. Imports no torch.

Importing diffusers needs seconds and torch. The launcher and the HTTP side only need names.
"""

import ast
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.files.source.interpreter import literal
from backends.files.source.values import UNKNOWN

NO_DEFAULT = object()
IMAGES = ("images", "image")
VIDEOS = ("frames", "videos", "video")
"""Fields of diffusers' outputs that hold what a user asked for, in order of preference."""

TIMETABLE = ("timesteps", "sigmas", "mu")
RETRIEVE = ("scheduler", "num_inference_steps", "device", "timesteps", "sigmas")
"""Parameters of retrieve_timesteps, which diffusers' pipelines share."""
OPTIONAL = "_optional_components"
CALLED_FIRST = "has to be called beforehand"
"""In the error of a class whose call continues another method's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCall:
    """The call of one pipeline class."""

    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Parameter -> default, in order; None for one that is computed. Without those that a request
    must bring."""
    required: tuple[str, ...] = ()
    """Parameters without a default."""
    annotations: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Parameter -> its type, as the source has it."""
    returns: tuple[str, ...] = ()
    """Fields of its result, as far as the source names them."""
    continues: bool = False
    """Whether it edits what another method has left, which must be called first."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.required, *self.defaults))


@lru_cache(maxsize=512)
def pipeline_call(name: str) -> PipelineCall | None:
    """Return the call of a pipeline class of the installed diffusers; None if it has no such one.

    name: of the class, such as 'FluxKontextPipeline'.
    """
    for class_name, node in _lineage(name):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__call__":
                return _read_call(item, class_name)
    return None


@lru_cache(maxsize=512)
def needed_components(name: str) -> Mapping[str, str]:
    """Return component -> declared class, of all that a pipeline class cannot do without."""
    for _, node in _lineage(name):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                made, optional = _read_call(item, name), _optional_components(name)
                return MappingProxyType(
                    {
                        part: made.annotations.get(part, "")
                        for part in made.required
                        if part not in optional
                    }
                )
    return MappingProxyType({})


def _optional_components(name: str) -> frozenset[str]:
    for _, node in _lineage(name):
        for item in node.body:
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == OPTIONAL:
                return frozenset(_literal(item.value) or ())
    return frozenset()


@lru_cache(maxsize=512)
def given_to_sampler(name: str, *, sampler: str, flow_sigmas: bool) -> frozenset[str]:
    """Return what a pipeline class always gives to its scheduler's set_timesteps, and not every
    scheduler takes: of `timesteps`, `sigmas`, `mu`.

    name: of the class. sampler: class of the scheduler, by which some classes choose what they
    give. flow_sigmas: the scheduler has use_flow_sigmas, at which some classes give it no sigmas.
    """
    function = _call_of(name)
    parts = list(_reached(function, sampler, flow_sigmas)) if function is not None else []
    given = [_given(part, parts) for part in parts if _sets_timesteps(part)]
    return frozenset.intersection(*given) if given else frozenset()


@lru_cache(maxsize=512)
def called_on_sampler(name: str, *, sampler: str) -> frozenset[str]:
    """Return the methods of its scheduler that a pipeline class calls whatever else is asked."""
    function = _call_of(name)
    parts = _reached(function, sampler, False, only_always=True) if function is not None else ()
    return frozenset(
        part.func.attr
        for part in parts
        if isinstance(part, ast.Call)
        and isinstance(part.func, ast.Attribute)
        and ast.unparse(part.func.value) == "self.scheduler"
    )


def _call_of(name: str) -> ast.FunctionDef | None:
    for _, node in _lineage(name):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__call__":
                return item
    return None


def _reached(
    node: ast.AST, sampler: str, flow_sigmas: bool, *, only_always: bool = False
) -> Iterator[ast.AST]:
    """Yield the node and all in it, without branches that are never taken with this sampler.

    only_always: nor those that other things decide about.
    """
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If | ast.IfExp):
        is_met = _is_met(node.test, sampler, flow_sigmas)
        if is_met is not None and isinstance(node, ast.If):
            children = [node.test, *(node.body if is_met else node.orelse)]
        elif only_always:
            children = [node.test]
    for child in children:
        yield from _reached(child, sampler, flow_sigmas, only_always=only_always)


def _is_met(test: ast.expr, sampler: str, flow_sigmas: bool) -> bool | None:
    """Return what a condition is with this sampler; None if other things decide."""
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _is_met(operand, sampler, flow_sigmas)
            return None if inner is None else not inner
        case ast.BoolOp(op=operator, values=values):
            found = [_is_met(value, sampler, flow_sigmas) for value in values]
            deciding = isinstance(operator, ast.Or)  # one true value decides `or`, one false `and`
            if deciding in found:
                return deciding
            return None if None in found else not deciding
        case ast.Call(func=ast.Name(id="isinstance"), args=[subject, kinds]):
            classes = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]
            names = [ast.unparse(each) for each in classes]
            if ast.unparse(subject) == "self.scheduler" and all(
                each.endswith("Scheduler") for each in names
            ):
                return sampler in names
        case ast.Compare(left=left, ops=[ast.NotEq() | ast.IsNot()], comparators=[kind]):
            if ast.unparse(left) == "type(self.scheduler)":
                return sampler != ast.unparse(kind)
    return False if "use_flow_sigmas" in ast.unparse(test) and not flow_sigmas else None


@lru_cache(maxsize=512)
def size_multiple(name: str) -> int:
    """Return the number of which a pipeline class's check_inputs wants height and width to be
    multiples; 1 if it wants none, or one that depends on the checkpoint.
    """
    for _, node in _lineage(name):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "check_inputs":
                return math.lcm(*_required_multiples(item))
    return 1


def _required_multiples(function: ast.FunctionDef) -> Iterator[int]:
    """Yield N of each `if height % N != 0: raise`."""
    for part in ast.walk(function):
        if not isinstance(part, ast.If) or not isinstance(part.body[0], ast.Raise):
            continue
        for test in ast.walk(part.test):
            if (
                isinstance(test, ast.BinOp)
                and isinstance(test.op, ast.Mod)
                and ast.unparse(test.left) in ("height", "width")
                and isinstance(test.right, ast.Constant)
            ):
                yield int(test.right.value)


def _sets_timesteps(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("retrieve_timesteps", "scheduler.set_timesteps")
    )


def _given(call: ast.Call, parts: Sequence[ast.AST]) -> frozenset[str]:
    """Return the arguments of a call whose values `parts` of its function have computed before.

    Not those that are None unless a request brings them.
    """
    helper = ast.unparse(call.func).endswith("retrieve_timesteps")
    plain = dict(zip(RETRIEVE, call.args, strict=False)) if helper else {}
    assigned = [
        part for part in parts if isinstance(part, ast.Assign) and part.lineno < call.lineno
    ]
    named: dict[str, ast.expr] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            named |= _entries(keyword.value, assigned)
        else:
            named[keyword.arg] = keyword.value
    return frozenset(
        name
        for name, value in {**plain, **named}.items()
        if name in TIMETABLE and _is_computed(value, assigned)
    )


def _entries(unpacked: ast.expr, assigned: Sequence[ast.Assign]) -> dict[str, ast.expr]:
    """Return the arguments in `**name`, where `name` is a dict that is written out."""
    return {
        key.value: value
        for each in _values_of(unpacked, assigned)
        if isinstance(each, ast.Dict)
        for key, value in zip(each.keys, each.values, strict=True)
        if isinstance(key, ast.Constant)
    }


def _values_of(name: ast.expr, assigned: Sequence[ast.Assign]) -> list[ast.expr]:
    return [
        part.value
        for part in assigned
        if isinstance(name, ast.Name)
        and any(isinstance(to, ast.Name) and to.id == name.id for to in part.targets)
    ]


def _is_computed(value: ast.expr, assigned: Sequence[ast.Assign]) -> bool:
    if not isinstance(value, ast.Name):
        return not isinstance(value, ast.Constant)
    found = _values_of(value, assigned)
    is_none = any(isinstance(each, ast.Constant) and each.value is None for each in found)
    return bool(found) and not is_none


@lru_cache(maxsize=8)
def source_of(name: str) -> tuple[dict[str, ast.FunctionDef], dict[str, Any], dict[str, Any]]:
    """Return the methods of a pipeline class, its own constants and those of its module."""
    methods: dict[str, ast.FunctionDef] = {}
    own: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for class_name, node in _lineage(name):
        found = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        methods = found | methods
        own = _constants(node.body) | own
        constants = _constants(_module(_files()[class_name]).body) | constants
    return methods, own, constants


def _constants(body: Sequence[ast.stmt]) -> dict[str, Any]:
    """Return the names to which a literal is given once."""
    given = [
        (each.targets[0].id, literal(each.value))
        for each in body
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
    ]
    counts = Counter(name for name, _ in given)
    return {name: value for name, value in given if counts[name] == 1}


def _lineage(name: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Yield the class and its bases, the class first, as far as they are pipelines of diffusers."""
    waiting, seen = [name], set()
    while waiting:
        current = waiting.pop(0)
        node = _class_node(current) if current not in seen else None
        seen.add(current)
        if node is not None:
            yield current, node
            waiting += [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def _class_node(name: str) -> ast.ClassDef | None:
    file = _files().get(name)
    return None if file is None else _classes(file).get(name)


@lru_cache(maxsize=8)
def _module(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@lru_cache(maxsize=8)
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _module(file).body if isinstance(node, ast.ClassDef)}


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """Return the file of each pipeline class of diffusers."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        return {}
    files = sorted((Path(spec.origin).parent / "pipelines").glob("**/*.py"))
    return {
        name: file
        for file in files
        for name in re.findall(r"^class (\w*Pipeline\w*)", file.read_text("utf-8"), re.MULTILINE)
    }


@lru_cache(maxsize=1)
def pipeline_folders() -> tuple[str, ...]:
    """Return the folders of diffusers' pipelines. Some components' classes are in them."""
    return tuple(sorted({"deprecated", *(file.parent.name for file in _files().values())}))


@lru_cache(maxsize=1)
def exported_pipelines() -> tuple[str, ...]:
    """Return the pipeline classes that the installed diffusers exports, in alphabetical order."""
    return tuple(sorted(exported_names() & _files().keys()))


@lru_cache(maxsize=1)
def exported_names() -> frozenset[str]:
    """Return what the installed diffusers exports; nothing if there is none."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        return frozenset()
    text = Path(spec.origin).read_text(encoding="utf-8")
    return frozenset(re.findall(r'"(\w+)"', text))


def _read_call(node: ast.FunctionDef, class_name: str) -> PipelineCall:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args][1:]  # without self
    values: list[Any] = [NO_DEFAULT] * (len(plain) - len(arguments.defaults))
    values += map(_literal, arguments.defaults)
    for default in arguments.kw_defaults:
        values.append(NO_DEFAULT if default is None else _literal(default))
    everything = [*plain, *arguments.kwonlyargs]
    pairs = list(zip((argument.arg for argument in everything), values, strict=True))
    return PipelineCall(
        defaults=MappingProxyType(
            {name: value for name, value in pairs if value is not NO_DEFAULT}
        ),
        required=tuple(name for name, value in pairs if value is NO_DEFAULT),
        annotations=MappingProxyType(
            {
                argument.arg: ast.unparse(argument.annotation)
                for argument in everything
                if argument.annotation is not None
            }
        ),
        returns=_returned(node),
        continues=any(
            isinstance(part, ast.Raise) and CALLED_FIRST in ast.unparse(part)
            for part in ast.walk(node)
        ),
    )


def _literal(node: ast.expr) -> Any:
    value = literal(node)
    return None if value is UNKNOWN else value


def _returned(node: ast.FunctionDef) -> tuple[str, ...]:
    """Return the names of the fields with which the call builds its result."""
    calls = (
        statement.value
        for statement in ast.walk(node)
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call)
    )
    return tuple(
        keyword.arg
        for call in calls
        if ast.unparse(call.func).endswith("Output")
        for keyword in call.keywords
        if keyword.arg is not None
    )
