"""Every error a user can meet: what went wrong, where, and what to do about it.

A `GraphoptError` carries a dotted `code` out of a closed set (the control socket and the logs send
it), a `where` (a node, a file with line and column, a path inside a document), a `remedy`, and
`detail`, the list of single faults when one document has several. The engine is unchanged whenever
one is raised.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar


class GraphoptError(Exception):
    """Base of all typed errors."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        remedy: str = "",
        detail: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy
        self.detail = tuple(detail)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        if self.detail:
            text += "".join(f"\n  {path}: {reason}" for path, reason in self.detail)
        return f"{text} ({self.remedy})" if self.remedy else text


class DocumentError(GraphoptError):
    """A YAML or JSON document is not what it should be; `where` is file, line, column and path."""

    code = "document.invalid"


class GraphTextError(DocumentError):
    """The text form of a graph is malformed; `line` and `column` count from 1."""

    code = "document.graph_text"

    def __init__(self, message: str, *, line: int, column: int = 1, remedy: str = "") -> None:
        super().__init__(message, where=f"line {line}, column {column}", remedy=remedy)
        self.line = line
        self.column = column


class LimitError(GraphoptError):
    """A bound of `graphopt.limits` was exceeded."""

    code = "limit.exceeded"


class DeltaError(GraphoptError):
    """A delta was refused; nothing of it was applied."""

    code = "delta.rejected"


class UnknownNodeError(DeltaError):
    """A delta names a node or value that the graph does not have."""

    code = "delta.unknown_node"


class UnknownConstantError(DeltaError):
    """A delta names a constant that the graph does not have."""

    code = "delta.unknown_constant"


class UnknownOpError(DeltaError):
    """An op is not in torch's registry, or may not be used in a graph (mutating, out=, random,
    I/O).
    """

    code = "delta.unknown_op"


class DuplicateNodeError(DeltaError):
    """A node, input or constant of that name exists already."""

    code = "delta.duplicate_name"


class NodeInUseError(DeltaError):
    """A removed node, input or constant is still used."""

    code = "delta.in_use"


class CycleError(DeltaError):
    """The edited graph would have a cycle."""

    code = "delta.cycle"


class TypeMismatchError(DeltaError):
    """An op does not accept its operands, or a value changed in a way its readers cannot take."""

    code = "delta.type_mismatch"


class InterfaceChangeError(DeltaError):
    """The delta changes the model's inputs or outputs without saying `allow_interface_change`."""

    code = "delta.interface_change"


class PreconditionError(DeltaError):
    """`if_revision` does not hold any more."""

    code = "delta.precondition_failed"


class DuplicateDeltaError(DeltaError):
    """The delta id was used before, with other content."""

    code = "delta.duplicate_id"


class AdapterError(DeltaError):
    """An adapter folder cannot be attached as it is."""

    code = "delta.adapter_refused"


class ImportRefusedError(GraphoptError):
    """A model cannot be imported; `where` names op and module path."""

    code = "import.refused"


class BundleError(GraphoptError):
    """A bundle is damaged, unsafe, or made for another torch."""

    code = "bundle.invalid"


class StateError(GraphoptError):
    """The state folder is corrupt, newer than this program, or in use by another process."""

    code = "state.unusable"


class ModelNotFoundError(GraphoptError):
    """No model of that name is loaded."""

    code = "model.unknown"


class ModelExistsError(GraphoptError):
    """A model of that name is loaded already."""

    code = "model.exists"


class RequestError(GraphoptError):
    """An inference request does not fit the model: name, dtype, shape or encoding."""

    code = "request.invalid"


class BusyError(GraphoptError):
    """A bounded queue is full; the caller may retry."""

    code = "busy"
    retryable = True


class DeadlineError(GraphoptError):
    """The deadline passed before the work could be done."""

    code = "deadline.exceeded"
    retryable = True


class AccessDeniedError(GraphoptError):
    """The peer may not call this method."""

    code = "auth.denied"


class ProtocolError(GraphoptError):
    """A control message is malformed."""

    code = "proto.invalid"


class StateInUseError(StateError):
    """Another process holds the state folder."""

    code = "state.in_use"


class StateNewerError(StateError):
    """The state folder was written by a newer program; `graphoptd` exits 65."""

    code = "state.newer"


class StateCorruptError(StateError):
    """Journal or blob bytes are not what was written; `graphoptd` exits 65."""

    code = "state.corrupt"


class StateFullError(StateError):
    """No space for a write; nothing of it was kept, and it may be tried again when there is space."""

    code = "state.full"
    retryable = True


class StateFailedError(StateError):
    """A sync or commit failed: nothing can be acknowledged any more; the process must exit and
    recover.
    """

    code = "state.failed"


class FactsError(GraphoptError):
    """Derived facts are not what the graph says: a bug of graphopt, found by the verify mode."""

    code = "internal.facts"


class BuilderError(GraphoptError):
    """The builder process could not do a job that has no candidate to blame; requests go on."""

    code = "builder.unavailable"
    retryable = True


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A remedy naming the `count` names nearest to `name`, or an empty string when nothing is near."""
    close = get_close_matches(name, list(dict.fromkeys(known)), n=count, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else ""
