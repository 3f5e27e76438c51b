"""The house rules that a machine can hold: who imports whom, what touches the clock, torch and
threads, how long things may get.

Every exception is written here with its reason. A rule that is in the way is changed here, in the
open, or the code is.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "graphopt": ROOT / "graphopt",
    "cost_models": ROOT / "cost_models",
    "graphoptd": ROOT / "daemon" / "graphoptd",
}
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
BANNED_NAMES = {"utils", "util", "misc", "common", "helpers", "stuff"}

# Layers of graphopt, lowest first. A module imports from its own layer (without a cycle) and from
# those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "limits", "tables", "explained", "kept"),
    (
        "dims",
        "types",
        "ops",
        "order",
        "safe_file",
        "safetensors_header",
        "safetensors_file",
        "document_text",
        "document_formats",
        "documents",
    ),
    ("graph", "change", "constants", "nodes", "signature", "spelling"),
    ("draft",),
    ("delta", "text", "text_parser", "bundle_manifest", "bundle"),
    ("analysis",),
    ("rewrite",),
    ("executor",),
    ("costs",),
    ("planner",),
    ("adapters", "frontend", "macros", "store"),
    ("delta_document",),  # reads macros too
    ("builder",),
    ("engine",),
    ("",),  # the package itself: the public names
)
# Imports against the layers, made inside a function because a method of the lower one offers what
# the higher one does.
LAYER_EXCEPTIONS = {
    ("graph", "draft"): "Graph.build checks a graph exactly as a delta is checked",
    ("graph", "text"): "print(graph)",
    ("graph", "bundle"): "graph.save(path)",
}
# Packages of one layer stay apart, but for these.
SIDEWAYS = {("macros", "adapters"): "attach_adapter reads a PEFT folder"}

# Where tensors are touched. Everything else loads without torch.
TORCH = {
    "ops": "the op registry is torch's",
    "constants": "tensors as constants",
    "delta": "PutConstant takes a tensor",
    "delta_document": "inline tensors",
    "safetensors_header": "dtypes",
    "safetensors_file": "reads tensors",
    "bundle": "constants",
    "bundle_manifest": "the torch version and op schemas",
    "analysis.probe": "runs ops on the meta device",
    "analysis.fake_run": "runs graphs on fake tensors",
    "builder.__main__": "threads of the process",
    "builder.boundaries": "values that cross into regions",
    "builder.models": "constants from mapped files",
    "builder.serve": "says its version",
    "builder.workshop": "says its version, which is that of the fused tier",
    "adapters.peft": "adapter weights",
    "adapters.resolve": "adapter weights",
    "macros.weights": "reads weights",
    "engine.builder_files": "constants as files",
    "engine.builder_link": "requests to verify on",
    "engine.builder_state": "requests to verify on",
    "engine.captured": "requests",
    "engine.engine": "requests",
    "engine.host": "thread counts",
    "engine.improve": "requests",
    "engine.ledger": "blobs of constants",
    "engine.live": "requests",
    "engine.records": "results",
}
TORCH_PACKAGES = {
    "executor": "it runs tensors",
    "frontend": "it reads torch modules",
    "rewrite": "passes make constants",
}
CLOCK = {
    "builder.__main__": "names the clocks of its process",
    "executor.publish": "measures how long the publish store took",
    "engine.host": "the one place that names the system's clocks; everything else is handed them",
    "frontend.cli": "a command says how long it took",
}
THREADS = {"executor": "the executor threads, one place"}
ASKS_RUNTIMES = {
    "graphopt.planner.proposal": "runs in the builder",
    "graphopt.builder.workshop": "is the builder",
    "cost_models.measuring": "builds what it measures, in a process of its own",
}
FORBIDDEN_IN_ENGINE = {
    "socket",
    "asyncio",
    "multiprocessing",
    "selectors",
    "http",
    "urllib",
    "requests",
    "pickle",
    "shelve",
    "marshal",
}
NETWORKX = {"analysis.naive": "dominators of the verify mode, never on the request path"}

Module = tuple[str, str, ast.Module, str]  # package, name inside it, tree, text


def modules(*packages: str) -> Iterator[Module]:
    for package in packages or PACKAGES:
        yield from read_package(package)


@cache
def read_package(package: str) -> tuple[Module, ...]:
    root, found = PACKAGES[package], []
    for path in sorted(root.rglob("*.py")) if root.is_dir() else ():
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append((package, name, ast.parse(text), text))
    return tuple(found)


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module imported anywhere in `tree`, with each name of a `from`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known(package: str) -> set[str]:
    return {name for _, name, _, _ in modules(package)}


def inner_imports(package: str, tree: ast.Module) -> set[str]:
    """The modules of the same package that `tree` imports, by name inside it."""
    names = known(package)
    found = {
        full.removeprefix(f"{package}.") for full in imports(tree) if full.startswith(f"{package}.")
    }
    return {name for name in found if name in names}


def layer_of(name: str) -> int:
    first = name.split(".")[0]
    places = [position for position, layer in enumerate(LAYERS) if first in layer]
    assert places, f"graphopt.{name} has no layer: add it to LAYERS where its imports allow"
    return places[0]


def roots(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def test_imports_go_from_the_daemon_to_cost_models_to_graphopt_and_never_back() -> None:
    allowed = {
        "graphopt": set(),
        "cost_models": {"graphopt"},
        "graphoptd": {"graphopt", "cost_models"},
    }
    for package, name, tree, _ in modules():
        others = roots(tree) & (PACKAGES.keys() - {package})
        assert others <= allowed[package], (
            f"{package}.{name} imports {sorted(others - allowed[package])}"
        )


def test_layers_of_graphopt_import_downwards() -> None:
    for _, name, tree, _ in modules("graphopt"):
        for other in inner_imports("graphopt", tree):
            is_allowed = layer_of(other) <= layer_of(name) or (name, other) in LAYER_EXCEPTIONS
            assert is_allowed, f"graphopt.{name} imports graphopt.{other}, which lies above it"


def test_packages_of_one_layer_stay_apart() -> None:
    for _, name, tree, _ in modules("graphopt"):
        package = name.split(".")[0]
        for other in inner_imports("graphopt", tree):
            target = other.split(".")[0]
            if package != target and any(
                {package, target} <= set(layer) for layer in LAYERS if "adapters" in layer
            ):
                assert (package, target) in SIDEWAYS, f"graphopt.{name} imports graphopt.{other}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    graph = nx.DiGraph()
    for _, name, tree, _ in modules(package):
        inside = {
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        deferred = {id(node) for function in inside for node in ast.walk(function)}
        top = ast.Module(
            [
                n
                for n in ast.walk(tree)
                if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in deferred
            ],
            [],
        )
        graph.add_edges_from(
            (name, other)
            for other in inner_imports(package, top)
            if other != name and name != other.split(".")[0]
        )
    packages_out = [
        n for n in graph if any(m.startswith(f"{n}.") for m in graph)
    ]  # a package re-exports its modules
    graph.remove_nodes_from(packages_out)
    assert list(nx.simple_cycles(graph)) == []


def test_exceptions_are_needed() -> None:
    trees = {name: tree for _, name, tree, _ in modules("graphopt")}
    for name, other in LAYER_EXCEPTIONS:
        assert other in inner_imports("graphopt", trees[name]), f"{name} no longer imports {other}"
    for table, module in ((TORCH, "torch"), (CLOCK, "time"), (NETWORKX, "networkx")):
        for name in table:
            assert name in trees, f"{name} is gone"
            assert module in roots(trees[name]), f"{name} no longer imports {module}"


def test_torch_is_imported_only_where_tensors_are_touched() -> None:
    for _, name, tree, _ in modules("graphopt"):
        if "torch" in roots(tree):
            assert name in TORCH or name.split(".")[0] in TORCH_PACKAGES, (
                f"graphopt.{name} imports torch"
            )


def test_the_engine_library_reads_no_clock_but_where_it_says_so() -> None:
    for _, name, tree, _ in modules("graphopt"):
        if roots(tree) & {"time", "datetime"}:
            assert name in CLOCK, f"graphopt.{name} reads the clock: let it be passed in"


def test_the_engine_library_reads_no_environment_and_opens_no_socket() -> None:
    for package, name, tree, _ in modules("graphopt", "cost_models"):
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"environ", "getenv", "putenv"}, (
            f"{package}.{name} reads the environment: let settings be passed in"
        )
        assert not roots(tree) & FORBIDDEN_IN_ENGINE, (
            f"{package}.{name} imports {roots(tree) & FORBIDDEN_IN_ENGINE}"
        )


def test_threads_are_started_in_the_executor_only() -> None:
    for _, name, tree, _ in modules("graphopt"):
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        started = {
            f.attr if isinstance(f, ast.Attribute) else f.id
            for f in calls
            if isinstance(f, ast.Attribute | ast.Name)
        }
        if started & {
            "Thread",
            "ThreadPoolExecutor",
            "ProcessPoolExecutor",
            "Timer",
            "start_new_thread",
        }:
            assert name.split(".")[0] in THREADS, f"graphopt.{name} starts threads"


def test_networkx_stays_off_the_request_path() -> None:
    for package, name, tree, _ in modules():
        if "networkx" in roots(tree):
            assert package == "graphopt", f"{package}.{name} imports networkx"
            assert name in NETWORKX, f"graphopt.{name} imports networkx"


def test_optional_runtimes_are_imported_lazily() -> None:
    for package, name, tree, _ in modules():
        top = {
            alias.name.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        top |= {
            node.module.split(".")[0]
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
        }
        assert not top & {"onnxruntime", "openvino", "transformers", "peft"}, (
            f"{package}.{name} needs {top} to be imported at all"
        )


def test_the_serving_process_never_asks_what_a_runtime_can_run() -> None:
    """An answer may take a conversion."""
    for package, name, tree, _ in modules():
        asked = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        if "unsupported" in asked:
            assert f"{package}.{name}" in ASKS_RUNTIMES, f"{package}.{name} asks a backend"
        if name.split(".")[0] == "engine" or package == "graphoptd":
            planners = {full for full in imports(tree) if full.startswith("graphopt.planner")}
            assert not planners, f"{package}.{name} plans in the serving process"


def test_modules_and_functions_stay_short() -> None:
    for package, name, tree, text in modules():
        lines = text.count("\n")
        assert lines <= MODULE_LINES_MAX, (
            f"{package}.{name} has {lines} lines: it answers more than one question"
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= FUNCTION_LINES_MAX, (
                    f"{package}.{name}.{node.name} has {length} lines"
                )


def test_names_say_what_is_inside() -> None:
    for package, name, _, _ in modules():
        assert not set(name.split(".")) & BANNED_NAMES, (
            f"{package}.{name}: name it after the question it answers"
        )


def test_every_module_opens_with_its_idea() -> None:
    for package, name, tree, text in modules():
        assert not text.strip() or ast.get_docstring(tree), f"{package}.{name} has no docstring"
