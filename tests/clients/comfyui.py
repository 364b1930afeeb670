"""As much of ComfyUI as a node meets: its two modules, how it imports a folder of custom_nodes, and
how it runs a node.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "clients" / "comfyui"
PLAIN = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}


class InterruptProcessingException(Exception):
    """What ComfyUI raises in a node when its user cancels."""


class ComfyUI:
    """One server with our nodes loaded. updates: what progress bars were told; interrupt: the
    cancel button.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.updates: list[tuple[int, int, Any]] = []
        self.is_interrupted = False
        self.on_update: Callable[[int, int], None] = lambda value, total: None
        self._install()
        name = str(folder).replace(".", "_x_")  # ComfyUI names such modules by their path
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        self.package = importlib.util.module_from_spec(spec)
        sys.modules[name] = self.package
        spec.loader.exec_module(self.package)
        self.name = name

    def _install(self) -> None:
        """comfy.utils and comfy.model_management in the place of the real ones."""
        comfy = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total, self.current = total, 0

            def update_absolute(
                self, value: int, total: int | None = None, preview: Any = None
            ) -> None:
                self.total = total or self.total
                self.current = min(value, self.total)
                comfy.updates.append((self.current, self.total, preview))
                comfy.on_update(self.current, self.total)

        def throw_exception_if_processing_interrupted() -> None:
            if comfy.is_interrupted:
                comfy.is_interrupted = False
                raise InterruptProcessingException

        package = ModuleType("comfy")
        package.utils = SimpleNamespace(ProgressBar=ProgressBar)
        package.model_management = SimpleNamespace(
            throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted
        )
        sys.modules |= {
            "comfy": package,
            "comfy.utils": package.utils,
            "comfy.model_management": package.model_management,
        }

    def close(self) -> None:
        sys.modules[f"{self.name}.hosts"].stop_all()
        for name in [
            name
            for name in sys.modules
            if name.split(".")[0] == "comfy" or name.startswith(self.name)
        ]:
            del sys.modules[name]

    def run(self, node: str, **inputs: Any) -> tuple[Any, ...]:
        """Check the inputs as ComfyUI does before it queues a workflow, call the node, and check
        what it gives.
        """
        kind = self.package.NODE_CLASS_MAPPINGS[node]
        assert node in self.package.NODE_DISPLAY_NAME_MAPPINGS and isinstance(kind.CATEGORY, str)
        declared = kind.INPUT_TYPES()
        checked_by_node = _arguments(getattr(kind, "VALIDATE_INPUTS", None))
        values = {}
        for section in ("required", "optional"):
            for name, (wanted, *options) in declared.get(section, {}).items():
                options = options[0] if options else {}
                if name in inputs:
                    values[name] = inputs.pop(name)
                elif "default" in options:
                    values[name] = options["default"]
                else:
                    assert section == "optional", f"{node}: {name} is not connected"
                    continue
                _check(name, values[name], wanted, options, is_free=name in checked_by_node)
        assert not inputs, f"{node} has no inputs {list(inputs)}"
        outputs = getattr(kind(), kind.FUNCTION)(**values)
        assert isinstance(outputs, tuple) and len(outputs) == len(kind.RETURN_TYPES) == len(
            kind.RETURN_NAMES
        )
        return outputs


def _arguments(check: Any) -> tuple[str, ...]:
    return check.__func__.__code__.co_varnames if check is not None else ()


def _check(name: str, value: Any, wanted: Any, options: dict[str, Any], *, is_free: bool) -> None:
    if isinstance(wanted, list):
        assert is_free or value in wanted, f"{name}={value!r} is not in the list"
    elif wanted in PLAIN:
        assert isinstance(value, PLAIN[wanted]), f"{name}={value!r} is no {wanted}"
        assert (
            options.get("min", value) <= value <= options.get("max", value) or wanted == "STRING"
        ), f"{name}={value!r} is out of range"
