"""graphopt: edit a live model graph while it serves.

    graph = graphopt.from_torch(module, example_inputs, name="minilm")
    with graphopt.Engine(graph, state_dir="state") as engine:
        y = engine(x)
        engine.apply("examples/attach_adapter.yaml")

Names are loaded when they are first used: `graphoptctl` needs the errors and not torch, and answers
in a tenth of the time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from graphopt.bundle import load_bundle as load
    from graphopt.bundle import save_bundle as save
    from graphopt.delta import (
        AddInput,
        AddNode,
        Delta,
        DropConstant,
        DropInput,
        PutConstant,
        RemoveNode,
        Rewire,
        SetAttr,
        SetOutputs,
        apply,
        compose,
        invert,
    )
    from graphopt.engine import Applied, DryRun, Engine, EngineSettings, Host, Result
    from graphopt.errors import GraphoptError
    from graphopt.frontend.torch_export import from_torch
    from graphopt.graph import Const, Graph, Node, Ref
    from graphopt.macros import (
        AttachAdapter,
        Bypass,
        DetachAdapter,
        InsertAfter,
        LoadWeights,
        ReplaceRegion,
        SetShapeProfile,
        SwapHead,
    )
    from graphopt.text import print_graph
    from graphopt.text_parser import parse_graph as parse

_HOMES = {
    "graphopt.bundle": {"load": "load_bundle", "save": "save_bundle"},
    "graphopt.delta": (
        "AddInput",
        "AddNode",
        "Delta",
        "DropConstant",
        "DropInput",
        "PutConstant",
        "RemoveNode",
        "Rewire",
        "SetAttr",
        "SetOutputs",
        "apply",
        "compose",
        "invert",
    ),
    "graphopt.engine": ("Applied", "DryRun", "Engine", "EngineSettings", "Host", "Result"),
    "graphopt.errors": ("GraphoptError",),
    "graphopt.frontend.torch_export": ("from_torch",),
    "graphopt.graph": ("Const", "Graph", "Node", "Ref"),
    "graphopt.macros": (
        "AttachAdapter",
        "Bypass",
        "DetachAdapter",
        "InsertAfter",
        "LoadWeights",
        "ReplaceRegion",
        "SetShapeProfile",
        "SwapHead",
    ),
    "graphopt.text": ("print_graph",),
    "graphopt.text_parser": {"parse": "parse_graph"},
}
_WHERE = {
    name: (module, names[name] if isinstance(names, dict) else name)
    for module, names in _HOMES.items()
    for name in names
}

__all__ = [
    "AddInput", "AddNode", "Applied", "AttachAdapter", "Bypass", "Const", "Delta",
    "DetachAdapter", "DropConstant", "DropInput", "DryRun", "Engine", "EngineSettings", "Graph",
    "GraphoptError", "Host", "InsertAfter", "LoadWeights", "Node", "PutConstant", "Ref",
    "RemoveNode", "ReplaceRegion", "Result", "Rewire", "SetAttr", "SetOutputs",
    "SetShapeProfile", "SwapHead", "apply", "compose", "from_torch", "invert", "load", "parse",
    "print_graph", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
