"""Reads YAML nodes into typed values. Errors name the file and the line. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import yaml

from backends.errors import ConfigError


class YamlNodes:
    """The nodes of one file, which know their line numbers."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name

    def fact(self, where: str, kind: Any, node: yaml.Node) -> Any:
        """Return the value of a node if it is of this kind, a type or an annotation such as
        tuple[str, ...].
        """
        value = self.value(node)
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise self.error(
                    node, f"{where}={value!r} is not allowed. Allowed: {', '.join(get_args(kind))}"
                )
            return value
        if get_origin(kind) is tuple:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise self.error(node, f"{where} must be a list of names, not {value!r}")
            return tuple(value)
        if get_origin(kind) is Mapping:
            if not isinstance(value, dict):
                raise self.error(node, f"{where} must be a mapping, not {value!r}")
            return MappingProxyType(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is not kind:
            raise self.error(node, f"{where} must be of type {kind.__name__}, not {value!r}")
        return value

    def items(self, node: yaml.Node) -> dict[str, yaml.Node]:
        """Return the items of a mapping. A key may occur once."""
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"expected a mapping, not {self.value(node)!r}")
        items: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node)
            if key in items:
                raise self.error(key_node, f"{key!r} occurs twice. Keep one")
            items[str(key)] = value_node
        return items

    def value(self, node: yaml.Node) -> Any:
        """Return the node as plain Python values."""
        return yaml.SafeLoader("").construct_document(node)

    def error(self, node: yaml.Node, what: str) -> ConfigError:
        """Return the error for what is wrong at this node."""
        return ConfigError(f"{self.file_name}, line {node.start_mark.line + 1}: {what}.")
