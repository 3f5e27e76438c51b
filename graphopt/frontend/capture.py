"""Running torch.export on a module as it is served: in eval mode and without gradients.

Gradients are off so that `torch.no_grad()` inside a model leaves no trace; torch's fused attention
fast path is off because it hides whole layers in one op. What torch refuses is refused here with
the op and the path of the module that ran it.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._sympy.numbers import int_oo

from graphopt.errors import ImportRefusedError
from graphopt.frontend.examples import TRACED_SIZE_MIN, Call
from graphopt.frontend.names import clean_path

REFINEMENTS_MAX = 3  # rounds of torch suggesting bounds for dims that the caller left open
_FIX = re.compile(r"^\s+(\w+) = (.+)$", re.MULTILINE)
_BOUNDS = re.compile(r"Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)\Z")
_CALL_MACHINERY = frozenset({"_wrapped_call_impl", "_call_impl"})  # of nn.Module itself
_QUIET = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export")


def export_module(module: torch.nn.Module, call: Call) -> tuple[ExportedProgram, Call]:
    """The module's program in functional form, and the call with the dynamic shapes that held.

    Bounds that the caller left open are narrowed to what the model accepts (a table of 512
    positions bounds the sequence). Raises ImportRefusedError.
    """
    with _as_served(module):
        for _ in range(REFINEMENTS_MAX):
            try:
                program = torch.export.export(
                    module, call.args, call.kwargs, dynamic_shapes=call.shapes, strict=False
                )
            except UserError as error:
                call = _refined(call, error, module)
                continue
            except Exception as error:
                raise _refusal(error, module) from error
            return _decomposed(program), call
    raise ImportRefusedError(
        "torch keeps suggesting other bounds for the dynamic dims",
        where="dynamic_shapes",
        remedy="give min and max: torch.export.Dim(name, min=..., max=...)",
    )


def functional(program: ExportedProgram) -> ExportedProgram:
    """An exported program in functional form; ImportRefusedError when torch cannot."""
    with torch.no_grad(), _quiet():
        return _decomposed(program)


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    try:
        functional_form: ExportedProgram = program.run_decompositions({})
        return functional_form
    except Exception as error:
        raise ImportRefusedError(
            f"torch cannot bring the program into functional form: {_first_line(error)}",
            where="run_decompositions",
            remedy="see the cause for the op",
        ) from error


@contextmanager
def _as_served(module: torch.nn.Module) -> Iterator[None]:
    training = [(part, part.training) for part in module.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for part, was_training in training:
            part.training = was_training


@contextmanager
def _quiet() -> Iterator[None]:
    levels = [(name, logging.getLogger(name).level) for name in _QUIET]
    for name, _ in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels:
            logging.getLogger(name).setLevel(level)


def _refined(call: Call, error: UserError, module: torch.nn.Module) -> Call:
    """The call with the bounds torch suggests, where the caller gave none; a refusal otherwise."""
    text = str(error)
    if "Constraints violated" not in text:
        raise _refusal(error, module) from error
    fixes = dict(_FIX.findall(text.partition("Suggested fixes:")[2].split("\n\n")[0]))
    asked = {dim.__name__: dim for dim in call.dims()}
    narrowed = {name: _narrowed(asked.get(name), fix) for name, fix in fixes.items()}
    if narrowed and all(dim is not None for dim in narrowed.values()):
        return call.with_dims(narrowed)
    remedy = "; ".join(f"{name} = {fix}" for name, fix in fixes.items())
    raise ImportRefusedError(
        f"the model does not accept these dynamic dims: {_constraints(text)}",
        where="dynamic_shapes",
        remedy=remedy or "make these dims static or bound them",
    ) from error


def _narrowed(dim: Any, fix: str) -> Any:
    """The dim with the bounds of torch's suggestion; None when the caller bounded it there himself."""
    bounds = _BOUNDS.match(fix)
    if bounds is None or dim is None:  # a fixed size, or a relation between dims
        return None
    low, high = dim.min, dim.max
    if bounds[1] is not None:
        if low > TRACED_SIZE_MIN:
            return None
        low = int(bounds[1])
    if bounds[2] is not None:
        if high is not int_oo:
            return None
        high = int(bounds[2])
    return Dim(dim.__name__, min=low, max=None if high is int_oo else high)


def _constraints(text: str) -> str:
    lines = [line.strip(" -.") for line in text.splitlines() if line.startswith("  - ")]
    return "; ".join(lines) or text.splitlines()[0]


def _refusal(error: Exception, module: torch.nn.Module) -> ImportRefusedError:
    op, path, line = _place(error.__traceback__, module)
    where = f"{op or 'export'} in {path or 'the root module'}{line}"
    if isinstance(error, GuardOnDataDependentSymNode):
        return ImportRefusedError(
            "a size or a branch depends on tensor contents",
            where=where,
            remedy="compute it from shapes, or use torch.where instead of a branch",
        )
    return ImportRefusedError(
        f"torch cannot export it: {_first_line(error)}",
        where=where,
        remedy="check that the module runs on these example inputs, or change the part named",
    )


def _place(trace: TracebackType | None, module: torch.nn.Module) -> tuple[str, str, str]:
    """The op, the path of the submodule and the line of its code that were running."""
    # Tracing hands forward a proxy of the module; it shares the module's __dict__.
    paths = {id(vars(part)): name for name, part in module.named_modules()}
    op = path = line = ""
    while trace is not None:
        local = trace.tb_frame.f_locals
        owner = local.get("self")
        if isinstance(owner, torch.nn.Module):
            known = paths.get(id(vars(owner)))
            code = trace.tb_frame.f_code
            if known is not None and code.co_name not in _CALL_MACHINERY:
                path, line = known, f" ({Path(code.co_filename).name}:{trace.tb_lineno})"
        func = local.get("func")
        if isinstance(func, torch._ops.OpOverload):
            op = str(func)
        trace = trace.tb_next
    return op, clean_path(path), line


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
