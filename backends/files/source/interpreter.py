"""Follows one method of a class as far as its arguments decide, without running it.

What cannot be told is UNKNOWN and decides nothing: an error is found only if the method raises it
whatever the unknown values are.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from backends.files.source.values import (
    CALLS,
    LONGEST,
    PLAIN,
    UNKNOWN,
    Component,
    attribute_of,
    kind_of,
    method_result,
    truth_of,
)

MOST_ROUNDS = 1000
"""Of a loop."""
MOST = 10**9
"""Of a number that is multiplied."""
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Pow: operator.pow,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda one, other: one in other,
    ast.NotIn: lambda one, other: one not in other,
}  # fmt: skip
FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class RaisedError(Exception):
    """The method raises. message: what it says. sources: the arguments that the condition reads."""

    def __init__(self, message: str, sources: Sequence[str]) -> None:
        super().__init__(message)
        self.sources = tuple(dict.fromkeys(sources))


class GaveUp(Exception):
    """Unknown values decide whether the rest is reached."""


class Returned(Exception):
    """The method ends."""


class Interpreter:
    """What is known while the methods of one object are followed."""

    def __init__(
        self,
        methods: Mapping[str, ast.FunctionDef],
        attributes: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None:
        """attributes: of `self`. constants: of the module."""
        self.attributes = dict(attributes)
        self._methods, self._constants = methods, constants

    def follow(self, name: str, given: Mapping[str, Any]) -> None:
        """Follow a method with these arguments. RaisedError if it refuses them."""
        self._enter(self._methods[name], given)

    def variable(self, variable: str, name: str, given: Mapping[str, Any]) -> Any:
        """Return what a variable is when a method returns; UNKNOWN if that cannot be told."""
        return self._enter(self._methods[name], given).get(variable, UNKNOWN)

    def _enter(
        self,
        function: ast.FunctionDef,
        given: Mapping[str, Any],
        sources: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Mapping[str, Any]:
        """Return the variables in the end, none if that cannot be told.

        sources: argument -> those of the first call that it comes from; the same by default.
        """
        values = _defaults(function)
        values |= {name: given[name] for name in given if name in values}
        frame = _Frame(
            self, values, {**({each: (each,) for each in values} if sources is None else sources)}
        )
        try:
            frame.run(function.body)
        except GaveUp:
            return {}
        except Returned:
            pass
        return frame.values

    def call_check(self, call: ast.Call, frame: "_Frame") -> None:
        """Follow `self.check_...(...)`."""
        function = self._methods.get(getattr(call.func, "attr", ""))
        if function is None or not function.name.startswith("check_"):
            return
        names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)][1:]
        if any(isinstance(each, ast.Starred) for each in call.args):
            return
        pairs = [*zip(names, call.args, strict=False)]
        pairs += [(each.arg, each.value) for each in call.keywords if each.arg is not None]
        values: dict[str, Any] = {}
        sources: dict[str, tuple[str, ...]] = {}
        for name, value in pairs:
            values[name], sources[name] = frame.value(value), frame.sources(value)
        self._enter(function, values, sources)

    def attribute(self, name: str) -> Any:
        """Return an attribute of `self`, also one that a property computes."""
        function = self._methods.get(name)
        if name in self.attributes or function is None:
            return self.attributes.get(name, UNKNOWN)
        is_property = any(ast.unparse(each) == "property" for each in function.decorator_list)
        return _Frame(self, {}, {}).returned(function) if is_property else UNKNOWN

    def constant(self, name: str) -> Any:
        return self._constants.get(name, UNKNOWN)


class _Frame:
    """The variables of one call."""

    def __init__(
        self, of: Interpreter, values: dict[str, Any], sources: dict[str, tuple[str, ...]]
    ) -> None:
        self._of, self.values, self._sources = of, values, sources

    def run(self, body: Sequence[ast.stmt], test: ast.expr | None = None) -> None:
        """Follow statements. test: the condition under which they are reached, if there is one."""
        for each in body:
            self._follow(each, test)

    def _follow(self, node: ast.stmt, test: ast.expr | None) -> None:
        match node:
            case ast.If():
                is_met = self.truth(node.test)
                if is_met is UNKNOWN:
                    self._skip(node)
                else:
                    self.run(node.body if is_met else node.orelse, node.test)
            case ast.Raise():
                raise RaisedError(self._said(node.exc), self.sources(test))
            case ast.Assert() if self.truth(node.test) is False:
                said = self._said(node.msg) if node.msg else ast.unparse(node.test)
                raise RaisedError(said, self.sources(node.test))
            case ast.Return():
                raise Returned
            case ast.Expr(value=ast.Call() as call):
                self._run_call(call)
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, self.value(value), self.sources(value))
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._assign(target, self.value(value), self.sources(value))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                made = self._operated(op, self.values.get(name, UNKNOWN), self.value(value))
                sources = (*self._sources.get(name, ()), *self.sources(value))
                self._assign(node.target, made, sources)
            case ast.For():
                self._loop(node, test)
            case ast.With(body=body):
                self.run(body, test)
            case ast.FunctionDef(name=name):
                self.values[name] = node
            case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.Assert() | ast.Global():
                pass
            case _:
                self._skip(node)

    def _run_call(self, call: ast.Call) -> None:
        if isinstance(call.func, ast.Attribute):
            owner = call.func.value
            if isinstance(owner, ast.Name) and owner.id == "self":
                self._of.call_check(call, self)
            elif isinstance(owner, ast.Name):
                self._forget(owner.id)

    def _assign(self, target: ast.expr, value: Any, sources: tuple[str, ...]) -> None:
        match target:
            case ast.Name(id=name):
                self.values[name], self._sources[name] = value, sources
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                self._of.attributes[name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                is_known = isinstance(value, list | tuple) and len(value) == len(parts)
                for part, each in zip(
                    parts, value if is_known else [UNKNOWN] * len(parts), strict=True
                ):
                    self._assign(part, each, sources)
            case ast.Subscript(value=ast.Name(id=name)):
                self._forget(name)

    def _loop(self, node: ast.For, test: ast.expr | None) -> None:
        over = self.value(node.iter)
        leaves = any(
            isinstance(each, ast.Break | ast.Continue | ast.Return) for each in ast.walk(node)
        )
        if leaves or not isinstance(over, list | tuple | range | set) or len(over) > MOST_ROUNDS:
            return self._skip(node)
        for each in over:
            self._assign(node.target, each, self.sources(node.iter))
            self.run(node.body, test)
        self.run(node.orelse, test)

    def _skip(self, node: ast.stmt) -> None:
        """Forget what statements may change that may be reached. GaveUp if they may end it all."""
        for each in ast.walk(node):
            match each:
                case ast.Return() | ast.Break() | ast.Continue():
                    raise GaveUp
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                    self.values[name] = UNKNOWN
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                    self.values[name] = UNKNOWN
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    self._of.attributes[name] = UNKNOWN
                case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                    self._forget(name)
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name))):
                    self._forget(name)

    def _forget(self, name: str) -> None:
        """Forget a variable that is changed in place, under all its names."""
        value = self.values.get(name, UNKNOWN)
        for other, same in self.values.items():
            if same is value and not isinstance(same, str | int | float | type(None)):
                self.values[other] = UNKNOWN

    def returned(self, function: ast.FunctionDef) -> Any:
        """Return what a function of one line returns; UNKNOWN of others."""
        *before, last = function.body
        is_plain = all(isinstance(each, ast.Expr) for each in before)
        if not is_plain or not isinstance(last, ast.Return) or last.value is None:
            return UNKNOWN
        is_logic = isinstance(last.value, ast.BoolOp | ast.Compare | ast.UnaryOp)
        return self.truth(last.value) if is_logic else self.value(last.value)

    def sources(self, node: ast.AST | None) -> tuple[str, ...]:
        """Return the arguments of the first call that an expression reads, in its order."""
        names = () if node is None else _names(node)
        return tuple(source for name in names for source in self._sources.get(name, ()))

    def _said(self, node: ast.expr | None) -> str:
        """Return the message of an error. What is not known stays as the code has it."""
        if isinstance(node, ast.Call):
            node = node.args[0] if node.args else None
        if isinstance(node, ast.JoinedStr):
            return "".join(self._part(each) for each in node.values)
        if isinstance(node, ast.BinOp):
            return self._said(node.left) + self._said(node.right)
        return "" if node is None else str(self.value(node))

    def _part(self, node: ast.expr) -> str:
        if not isinstance(node, ast.FormattedValue):
            return str(self.value(node))
        value = self.value(node.value)
        if isinstance(value, list | tuple | set | dict) and not _is_plain(value):
            value = UNKNOWN
        if isinstance(value, type):
            return value.__name__
        return str(value) if isinstance(value, PLAIN) else ast.unparse(node.value)

    def truth(self, node: ast.expr) -> Any:
        """Return whether an expression is true; UNKNOWN if that cannot be told."""
        if isinstance(node, ast.BoolOp):
            deciding = isinstance(node.op, ast.Or)
            found = []
            for each in node.values:
                found.append(self.truth(each))
                if found[-1] is deciding:
                    return deciding
            return UNKNOWN if UNKNOWN in found else not deciding
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return UNKNOWN if inner is UNKNOWN else not inner
        return truth_of(self.value(node))

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression; UNKNOWN if that cannot be told."""
        try:
            return self._value(node)
        except FAILURES:
            return UNKNOWN

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self.values[name] if name in self.values else self._of.constant(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return self._of.attribute(name)
            case ast.Attribute(value=owner, attr=name):
                return attribute_of(self.value(owner), name)
            case ast.BoolOp(op=op, values=values):
                return self._chosen(values, isinstance(op, ast.Or))
            case ast.UnaryOp(op=ast.Not()):
                return self.truth(node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._operated(op, self.value(left), self.value(right))
            case ast.Compare():
                return self._compared(node)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                is_met = self.truth(test)
                return UNKNOWN if is_met is UNKNOWN else self.value(body if is_met else orelse)
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                made = [self.value(each) for each in parts]
                kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return kind(made)
            case ast.Subscript(value=owner, slice=ast.Slice(lower=low, upper=high, step=None)):
                ends = [None if each is None else self.value(each) for each in (low, high)]
                found = self.value(owner)
                return found[slice(*ends)] if isinstance(found, PLAIN) else UNKNOWN
            case ast.Subscript(value=owner, slice=place):
                found = self.value(owner)
                return found[self.value(place)] if isinstance(found, PLAIN) else UNKNOWN
            case ast.Call():
                return self._called(node)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                made = list(self._each(node))
                return set(made) if isinstance(node, ast.SetComp) else made
        return UNKNOWN

    def _chosen(self, values: Sequence[ast.expr], is_or: bool) -> Any:
        found: Any = UNKNOWN
        for each in values:
            found = self.value(each)
            is_true = truth_of(found)
            if is_true is UNKNOWN:
                return UNKNOWN
            if is_true is is_or:
                return found
        return found

    def _operated(self, op: ast.operator | ast.cmpop, one: Any, other: Any) -> Any:
        if type(op) not in OPERATORS or not (_is_plain(one) and _is_plain(other)):
            return UNKNOWN
        if isinstance(op, ast.Mult | ast.Pow):
            sizes = [each if isinstance(each, int | float) else len(each) for each in (one, other)]
            most = 64 if isinstance(op, ast.Pow) else MOST
            are_numbers = all(isinstance(each, int | float) for each in (one, other))
            if max(map(abs, sizes)) > (most if are_numbers else LONGEST):
                return UNKNOWN
        return OPERATORS[type(op)](one, other)

    def _compared(self, node: ast.Compare) -> Any:
        one = self.value(node.left)
        for op, right in zip(node.ops, node.comparators, strict=True):
            other = self.value(right)
            if one is UNKNOWN or other is UNKNOWN:
                return UNKNOWN
            if isinstance(op, ast.Is | ast.IsNot):
                if not any(each is None or isinstance(each, bool | type) for each in (one, other)):
                    return UNKNOWN
                found = (one is other) is isinstance(op, ast.Is)
            else:
                found = self._operated(op, one, other)
            if found is not True:
                return found
            one = other
        return True

    def _called(self, call: ast.Call) -> Any:
        match call.func:
            case ast.Name(id="isinstance"):
                return self._is_instance(*call.args)
            case ast.Name(id="getattr"):
                return self._attribute(call)
            case ast.Name(id=name) if isinstance(self.values.get(name), ast.FunctionDef):
                function = self.values[name]
                names = [each.arg for each in function.args.args]
                given = dict(zip(names, map(self.value, call.args), strict=True))
                return _Frame(self._of, self.values | given, {}).returned(function)
            case ast.Name(id=name) if name in CALLS and not call.keywords:
                if name in ("any", "all") and isinstance(call.args[0], ast.GeneratorExp):
                    return self._any_or_all(name, call.args[0])
                arguments = [self.value(each) for each in call.args]
                if any(not _is_shallow(each) for each in arguments):
                    return UNKNOWN
                if name == "type" or all(isinstance(each, PLAIN) for each in arguments):
                    made = CALLS[name](*arguments)
                    return list(made) if isinstance(made, zip | enumerate) else made
            case ast.Attribute(value=ast.Name(id="torch"), attr="is_tensor"):
                return self._is_instance(call.args[0], ast.Name(id="Tensor"))
            case ast.Attribute(value=owner, attr=name) if not call.keywords:
                arguments = [self.value(each) for each in call.args]
                return method_result(self.value(owner), name, arguments)
        return UNKNOWN

    def _attribute(self, call: ast.Call) -> Any:
        owner, name, *otherwise = call.args
        if not (isinstance(owner, ast.Name) and owner.id == "self"):
            return UNKNOWN
        found = self._of.attributes.get(self.value(name), UNKNOWN)
        return found if isinstance(found, Component) or not otherwise else UNKNOWN

    def _is_instance(self, subject: ast.expr, kinds: ast.expr) -> Any:
        value = self.value(subject)
        if value is UNKNOWN:
            return UNKNOWN
        known = [kind_of(name) for name in _type_names(kinds)]
        found = tuple(kind for kind in known if isinstance(kind, type))
        if isinstance(value, found):
            return True
        return UNKNOWN if len(found) < len(known) else False

    def _any_or_all(self, name: str, node: ast.GeneratorExp) -> Any:
        found = [truth_of(each) for each in self._each(node)]
        deciding = name == "any"
        if deciding in found:
            return deciding
        return UNKNOWN if UNKNOWN in found else not deciding

    def _each(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> Iterator[Any]:
        """Yield the values of a comprehension. LookupError if they cannot be told."""
        first, *others = node.generators
        over = self.value(first.iter)
        if others or first.ifs or not isinstance(over, list | tuple | range | set | dict):
            raise LookupError
        inner = _Frame(self._of, dict(self.values), dict(self._sources))
        for each in list(over)[: LONGEST + 1]:
            inner._assign(first.target, each, self.sources(first.iter))
            yield inner.value(node.elt)


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    """Return the parameters of a method with their defaults."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args][1:]
    found: dict[str, Any] = {
        each.arg: UNKNOWN for each in (*plain, *arguments.kwonlyargs, arguments.vararg,
                                       arguments.kwarg) if each is not None
    }  # fmt: skip
    last = plain[len(plain) - len(arguments.defaults) :]
    pairs = [*zip(last, arguments.defaults, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return found | {each.arg: literal(value) for each, value in pairs if value is not None}


def literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return UNKNOWN


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def _type_names(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Tuple | ast.List):
        return [name for each in node.elts for name in _type_names(each)]
    if isinstance(node, ast.BinOp):
        return [*_type_names(node.left), *_type_names(node.right)]
    return [ast.unparse(node)]


def _is_shallow(value: Any) -> bool:
    """Whether a value, and each one in it, is known."""
    if isinstance(value, list | tuple | set):
        return UNKNOWN not in value
    return value is not UNKNOWN


def _is_plain(value: Any) -> bool:
    """Whether a value holds nothing but what compares as in the code."""
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, PLAIN)
