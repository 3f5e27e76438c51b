"""Where `graphopt import` takes a model from: `hf:DIR`, `module:factory` or a `.pt2` file.

All of these but safetensors run code of the model's author or can: import runs as the calling user,
never in the daemon. Deliberately absent: downloading anything.
"""

import importlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import ImportRefusedError
from graphopt.frontend.names import unique_name

if TYPE_CHECKING:
    from graphopt.graph import Graph

FORMS = "hf:DIR (a transformers folder), module:factory, or FILE.pt2"
_FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)\Z")
_PT2_WARNING = (
    "{path}: a .pt2 file can run code when it is read; go on only if you trust where it comes from"
)

Say = Callable[[str], None]


def is_source(text: str) -> bool:
    """Whether `text` has one of the `FORMS`."""
    return text.startswith("hf:") or text.endswith(".pt2") or _FACTORY.match(text) is not None


def load_source(
    source: str, *, name: str = "", task: str | None = None, inputs: Sequence[str] = (), say: Say
) -> "Graph":
    """The graph of `source`, which has one of the `FORMS`. `say` is told what takes long.

    Raises:
        ImportRefusedError: the source cannot be read, or holds a model that cannot be imported.
    """
    if source.startswith("hf:"):
        return _from_folder(source.removeprefix("hf:"), name, task, inputs, say)
    if source.endswith(".pt2"):
        return _from_pt2(Path(source), name, say)
    match = _FACTORY.match(source)
    assert match is not None
    return _from_factory(match[1], match[2], name, say)


def _from_folder(
    folder: str, name: str, task: str | None, inputs: Sequence[str], say: Say
) -> "Graph":
    say(f"reading {folder} and tracing the model")
    from graphopt.frontend.huggingface import from_folder  # loads torch: seconds, after the message

    return from_folder(folder, task=task, inputs=inputs, name=name)


def _from_pt2(path: Path, name: str, say: Say) -> "Graph":
    if not path.is_file():
        raise ImportRefusedError("no such file", where=str(path), remedy="check the path")
    say("warning: " + _PT2_WARNING.format(path=path))
    import torch  # seconds, after the message

    from graphopt.frontend.torch_export import from_program

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:
        raise ImportRefusedError(
            f"torch cannot read it: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(path),
            remedy="write it with torch.export.save of the same torch release",
        ) from error
    say("reading the program")
    return from_program(program, unique_name(name or path.stem, ()), share_memory=True)


def _from_factory(module_name: str, factory: str, name: str, say: Say) -> "Graph":
    where = f"{module_name}:{factory}"
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    say(f"calling {where}")
    try:
        made = getattr(importlib.import_module(module_name), factory)()
    except Exception as error:
        raise ImportRefusedError(
            f"the factory failed: {_last_frame(error)}",
            where=where,
            remedy="it is called without arguments, with the current folder importable",
        ) from error
    _check_made(made, where)
    say("tracing the model")
    from graphopt.frontend.torch_export import from_torch

    module, examples, shapes = made
    return from_torch(module, examples, shapes, unique_name(name or factory, ()), share_memory=True)


def _check_made(made: Any, where: str) -> None:
    import torch

    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], torch.nn.Module):
        raise ImportRefusedError(
            f"the factory returned {type(made).__name__}",
            where=where,
            remedy="return (module, example_inputs, dynamic_shapes); dynamic_shapes may be None",
        )


def _last_frame(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}"
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
