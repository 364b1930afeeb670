"""Who may import whom, and where a few things may be written at all: read from the source with
ast.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from backends import plan_module
from backends.model_table import read_table
from backends.request import GenerateRequest

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = [path.parent for path in sorted((ROOT / "backends").glob("*/backend.py"))]
SHARED = [path for path in sorted((ROOT / "backends").rglob("*.py")) if path.parent not in BACKENDS]
HOSTS = sorted((ROOT / "hosts").rglob("*.py"))
PRODUCT = [ROOT / "launcher.py", *HOSTS, *sorted((ROOT / "backends").rglob("*.py"))]
TORCH_FREE_FOLDERS = ("launch", "http", "dialects", "jobs", "supervision", "compat", "cluster")
NEEDS_TORCH = {"hosts.supervision.agent", "hosts.cluster.reaper"}
"""torchelastic is in torch; the reaper is a program of its own."""


def modules(folder: Path) -> list[str]:
    """Dotted names of the files below a folder."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(folder.rglob("*.py"))
        if path.stem != "__init__"
    ]


WITHOUT_TORCH = [
    "launcher",
    "hosts.main",
    *(
        dotted
        for room in TORCH_FREE_FOLDERS
        for dotted in modules(ROOT / "hosts" / room)
        if dotted not in NEEDS_TORCH
    ),
    *(
        f"backends.{name}"
        for name in (
            "request model_table errors options plan quantization_spec step_cache_spec".split()
        )
    ),
    "backends.parallel.transformers",
    *(f"backends.autotune.{name}" for name in "candidates cost estimate ranking".split()),
    *(f"backends.generation.{name}" for name in "schedulers step_window batching".split()),
    *modules(ROOT / "backends" / "generation" / "own_class"),
    "backends.groups.alarm",
    "backends.groups.message",
    *modules(ROOT / "backends" / "files"),
    *modules(ROOT / "backends" / "hub"),
    *(f"backends.{folder.name}.plan" for folder in BACKENDS),
]
TESTS_OF_THE_TREE = [
    path for top in ("backends", "hosts") for path in (ROOT / "tests" / top).rglob("test_*.py")
]
MAY_READ_ENVIRONMENT = {
    ROOT / "hosts" / "main.py",
    ROOT / "hosts" / "compat" / "host.py",
    ROOT / "launcher.py",
    ROOT / "backends" / "hub" / "worker.py",  # a program of its own
}
MODEL_TYPES = set(read_table())


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> set[str]:
    """Dotted names of everything the file imports, anywhere in it, except for type checking."""
    found: set[str] = set()
    for node in _walk_what_runs(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def attributes(path: Path) -> set[str]:
    """Every attribute that the file reads or writes, as it is written there."""
    return {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}


def _walk_what_runs(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _walk_what_runs(child)


def below(names: set[str], package: str) -> set[str]:
    return {dotted for dotted in names if dotted == package or dotted.startswith(package + ".")}


def offenders(paths: Iterable[Path], *packages: str) -> dict[str, set[str]]:
    """File -> what it imports of these packages, for the files that import anything of them."""
    found = {
        name(path): {dotted for package in packages for dotted in below(imported(path), package)}
        for path in paths
    }
    return {path: names for path, names in found.items() if names}


MOST_FILES_IN_A_FOLDER = 14
MOST_ARROWS_BETWEEN_ROOMS = 30
SHARED_ROOMS = {"backends", "backends.groups", "backends.parallel"}
METHOD_MAY = {*SHARED_ROOMS, "backends.autotune"}
"""For the shared half of its cost.py."""
MAY_IMPORT = {
    "launcher": {
        "backends",
        *(f"hosts.{room}" for room in "main launch http supervision compat cluster".split()),
    },
    "hosts.main": {
        "backends",
        "backends.autotune",
        *(f"hosts.{room}" for room in "launch http jobs ranks supervision".split()),
    },
    "hosts.launch": {
        "backends",
        *(f"backends.{folder}" for folder in "autotune files generation hub".split()),
    },
    "hosts.supervision": {"backends", "hosts.launch"},
    "hosts.jobs": {"backends", "backends.generation", "hosts.launch", "hosts.supervision"},
    "hosts.http": {
        "backends",
        "backends.generation",
        *(f"hosts.{room}" for room in "launch jobs supervision".split()),
    },
    "hosts.dialects": {
        "backends",
        "backends.generation",
        *(f"hosts.{room}" for room in "http jobs supervision".split()),
    },
    "hosts.ranks": {
        *(SHARED_ROOMS | {"backends.autotune", "backends.generation"}),
        *(f"hosts.{room}" for room in "launch jobs supervision".split()),
    },
    "hosts.compat": {
        "backends",
        *(f"hosts.{room}" for room in "main launch http dialects jobs ranks supervision".split()),
    },
    "hosts.cluster": {
        "backends",
        "backends.files",
        *(f"hosts.{room}" for room in "launch http dialects compat jobs supervision".split()),
    },
    "backends": set(),
    "backends.files": {"backends"},
    "backends.hub": {"backends"},
    "backends.groups": {"backends"},
    "backends.parallel": {"backends", "backends.groups"},
    "backends.loading": SHARED_ROOMS | {"backends.files"},
    "backends.generation": SHARED_ROOMS | {"backends.files", "backends.loading"},
    "backends.autotune": SHARED_ROOMS | {"backends.generation"},
    **{f"backends.{folder.name}": METHOD_MAY for folder in BACKENDS},
}
"""Room -> the rooms that it may import; the table of docs/architecture.md says why."""


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """The files of the product that a file imports."""
    candidates = (ROOT / dotted.replace(".", "/") for dotted in imported(path))
    files = {
        file for each in candidates for file in (each.with_suffix(".py"), each / "__init__.py")
    }
    return frozenset(files & set(PRODUCT) - {path})


def room(path: Path) -> str:
    """hosts/http/page/routes.py -> hosts.http; hosts/main.py and launcher.py are rooms themselves,
    and the files of backends/ are one.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "backends" and len(parts) == 2:
        return "backends"
    return ".".join(parts[:2])


def arrows(group_of: Callable[[Path], Any]) -> dict[Any, set[Any]]:
    """Which groups of files import which others."""
    found: dict[Any, set[Any]] = {group_of(path): set() for path in PRODUCT}
    for path in PRODUCT:
        found[group_of(path)] |= {group_of(file) for file in imported_files(path)}
    return {group: others - {group} for group, others in found.items()}


def circle(graph: Mapping[Any, set[Any]]) -> list[Any]:
    """A circle of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_room_imports_the_rooms_below_it_only():
    found = {room: others - MAY_IMPORT.get(room, set()) for room, others in arrows(room).items()}
    assert not {room: others for room, others in found.items() if others}


def test_rooms_of_hosts_are_joined_by_few_arrows():
    between = [
        (one, other)
        for one, others in arrows(room).items()
        for other in others
        if one.startswith("hosts.") and other.startswith("hosts.")
    ]
    assert len(between) <= MOST_ARROWS_BETWEEN_ROOMS, sorted(between)


def test_no_circle_of_imports_between_files():
    assert [name(path) for path in circle(arrows(lambda path: path))] == []


def test_no_circle_of_imports_between_folders():
    assert [name(folder) for folder in circle(arrows(lambda path: path.parent))] == []


def test_no_folder_of_code_is_crowded():
    counts = Counter(path.parent for path in PRODUCT if path.stem != "__init__")
    crowded = {name(folder): n for folder, n in counts.items() if n > MOST_FILES_IN_A_FOLDER}
    assert not crowded


def test_tests_mirror_the_tree():
    """A folder of tests is named after the folder that it tests."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS_OF_THE_TREE}
    assert not [str(folder) for folder in folders if not (ROOT / folder).is_dir()]


def test_backends_know_nothing_of_hosts_or_http():
    assert not offenders(
        (ROOT / "backends").rglob("*.py"), "hosts", "launcher", "flask", "werkzeug", "cheroot"
    )


@pytest.mark.parametrize("folder", BACKENDS, ids=name)
def test_no_backend_imports_another(folder):
    assert not offenders(
        folder.rglob("*.py"), *(f"backends.{other.name}" for other in BACKENDS if other != folder)
    )


def test_a_backend_is_reached_through_the_registry_only():
    assert not offenders(
        [*SHARED, *HOSTS, ROOT / "launcher.py"], *(f"backends.{folder.name}" for folder in BACKENDS)
    )


def test_only_the_existing_clients_routes_can_reach_the_pickle_reader():
    """Neither /v1, nor the other dialects, nor what a gateway and its replicas exchange."""
    modern = [
        *(ROOT / "hosts" / "http").rglob("*.py"),
        *(ROOT / "hosts" / "dialects").rglob("*.py"),
        *(ROOT / "hosts" / "jobs").rglob("*.py"),
        ROOT / "hosts" / "cluster" / "messages.py",
        ROOT / "hosts" / "cluster" / "replica_slot.py",
    ]
    assert not offenders(modern, "hosts.compat", "pickle")
    program = "import sys, hosts.http.app, hosts.cluster.messages, hosts.dialects.openai\n"
    program += "assert not [name for name in sys.modules if name.startswith('hosts.compat')]"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_ray_is_an_extra_that_two_files_import_when_they_need_it():
    for path in PRODUCT:
        top_level = {
            alias.name
            for node in tree(path).body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not below(top_level, "ray"), name(path)
    may = {ROOT / "hosts" / "cluster" / name for name in ("nodes.py", "replica_host.py")}
    assert not offenders([path for path in PRODUCT if path not in may], "ray")


def test_hosts_do_not_import_diffusers():
    assert not offenders(HOSTS, "diffusers")


MAY_IMPORT_DISTRIBUTED = {
    *sorted((ROOT / "backends" / "groups").glob("*.py")),
    ROOT / "hosts" / "supervision" / "agent.py",
}
"""Groups of ranks, and the process above the ranks, which has none."""


def test_torch_distributed_belongs_to_one_shared_file_and_the_backends():
    others = [
        path
        for path in [*SHARED, *HOSTS, ROOT / "launcher.py"]
        if path not in MAY_IMPORT_DISTRIBUTED
    ]
    assert not offenders(others, "torch.distributed")
    assert not [name(path) for path in others if "torch.distributed" in attributes(path)]


def test_launcher_imports_only_what_it_needs_before_it_knows_what_to_do():
    top_level = {
        node.module
        for node in tree(ROOT / "launcher.py").body
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("hosts", "backends"))
    }
    assert top_level <= {
        "backends.errors",
        "backends.model_table",
        "hosts.launch",
        "hosts.launch.command_line",
        "hosts.launch.settings",
    }
    assert len((ROOT / "launcher.py").read_text().splitlines()) < 150
    assert len((ROOT / "hosts" / "main.py").read_text().splitlines()) < 200


def test_environment_is_read_at_the_entries_only():
    readers = {"os.environ", "os.getenv", "os.putenv"}
    others = [path for path in PRODUCT if path not in MAY_READ_ENVIRONMENT]
    assert not [name(path) for path in others if (attributes(path) | imported(path)) & readers]


def test_code_never_decides_by_the_name_of_a_model_type():
    for path in PRODUCT:
        _never_decides_by_a_type(path)


def _never_decides_by_a_type(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            operands = [
                operand for side in (node.left, *node.comparators) for operand in ast.walk(side)
            ]
            texts = {
                operand.value
                for operand in operands
                if isinstance(operand, ast.Constant) and isinstance(operand.value, str)
            }
            assert not texts & MODEL_TYPES, f"{name(path)}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
            assert node.value.value not in MODEL_TYPES, f"{name(path)}:{node.lineno}"


def _private_options() -> set[str]:
    """Spellings of the options of single backends; requests may have a field of the same name."""
    modules = [plan_module(folder.name) for folder in BACKENDS]
    own = {
        spelling
        for module in modules
        for option in module.OPTIONS
        for spelling in (option.name, *option.aliases)
    }
    shared = {name for module in modules for name in module.READS}
    return own - shared - set(GenerateRequest.model_fields)


def _names_options(node: ast.AST, options: set[str]) -> set[str]:
    """The options that a string, an attribute or an argument names. A plain word, such as stride,
    has other meanings too: it counts where it is the whole string, a flag or a setting.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        words = set(re.findall(r"(?<!-)\b\w+\b", node.value)) & {o for o in options if "_" in o}
        flags = {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", node.value)}
        return words | (flags | {node.value}) & options
    if isinstance(node, ast.Attribute):
        is_setting = "_" in node.attr or ast.unparse(node.value).endswith(("settings", "options"))
        return {node.attr} & options if is_setting else set()
    if isinstance(node, ast.keyword) and "_" in (node.arg or ""):
        return {node.arg} & options
    return set()


COMPAT = ROOT / "hosts" / "compat"
KNOWN_TO_NO_SINGLE_BACKEND = [
    path for path in [*SHARED, *HOSTS, ROOT / "launcher.py"] if path.parent != COMPAT
]
"""hosts/compat holds the names that old clients send."""


def test_options_of_single_backends_are_known_in_their_folders_only():
    options = _private_options()
    assert {"sync_mode", "model_n", "ulysses_degree", "parallelism", "stride"} <= options
    found = {
        f"{name(path)}:{getattr(node, 'lineno', 0)}": named
        for path in KNOWN_TO_NO_SINGLE_BACKEND
        for node in ast.walk(tree(path))
        if (named := _names_options(node, options))
    }
    assert not found


def test_shared_code_asks_the_facts_of_a_plan_and_not_its_options():
    readers = [name(path) for path in KNOWN_TO_NO_SINGLE_BACKEND if _reads_options(path)]
    assert readers == ["hosts/launch/start_plan.py"]  # which prints them all


def _reads_options(path: Path) -> bool:
    return any(attribute.endswith("plan.options") for attribute in attributes(path))


def test_shared_code_names_a_backend_in_the_registry_only():
    names = {folder.name for folder in BACKENDS} - {"single"}
    found = {
        name(path)
        for path in KNOWN_TO_NO_SINGLE_BACKEND
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"backends/__init__.py"}


def test_file_has_a_docstring_and_under_500_lines():
    tests = (path for path in (ROOT / "tests").rglob("*.py") if path.stem != "__init__")
    files = [*PRODUCT, *tests]
    assert not [name(path) for path in files if not ast.get_docstring(tree(path))]
    assert not [
        name(path) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 500
    ]


def test_source_is_ascii():
    assert not [name(path) for path in PRODUCT if not path.read_text(encoding="utf-8").isascii()]


def test_what_the_http_side_and_the_launcher_need_imports_no_torch():
    program = "\n".join(
        [
            "import importlib, sys",
            f"for name in {WITHOUT_TORCH!r}:",
            "    importlib.import_module(name)",
            "    heavy = {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)",
            "    assert not heavy, f'{name} imports {heavy}'",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_routes_say_whose_jobs_they_look_for():
    """Else one client could see another's. The gateway looks for the model of any job."""
    for folder in ("http", "dialects", "compat", "cluster"):
        for path in (ROOT / "hosts" / folder).rglob("*.py"):
            calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
            for call in calls:
                if re.search(r"queue\.(find|jobs)$", ast.unparse(call.func)):
                    assert "owner=" in ast.unparse(call), f"{name(path)}: {ast.unparse(call)}"
