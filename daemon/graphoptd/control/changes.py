"""Methods that change models. All or nothing, and each refusal is one line of the log.

A change is journaled and live when its answer is sent. The engine logs what it refuses itself; what
is refused before it gets that far (a document, a file, an unknown model) is logged here.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from graphopt.bundle import load_bundle
from graphopt.delta import Delta
from graphopt.delta_document import decode_delta
from graphopt.documents import load_json, load_yaml, rule
from graphopt.engine.host import Host
from graphopt.engine.live import LiveModel
from graphopt.engine.records import Applied
from graphopt.errors import (
    BusyError,
    DeltaError,
    DuplicateDeltaError,
    GraphoptError,
    ModelExistsError,
)
from graphopt.limits import DOCUMENT_BYTES_MAX, NAME_CHARS_MAX
from graphopt.safe_file import read_bounded
from graphoptd.control.context import acting_for
from graphoptd.control.descriptors import (
    SentFiles,
    bundle_parts,
    by_path,
    close_all,
    find_constant,
    staged,
)
from graphoptd.control.task import Answer, Task
from graphoptd.control.wire import DESCRIPTORS_CALL_MAX
from graphoptd.events import emit

SOURCE = "control"
_NAME = rule(chars_max=NAME_CHARS_MAX)
_PATH = rule(chars_max=4096)  # PATH_MAX of Linux


@dataclass(frozen=True, slots=True)
class SentPath:
    """A path of the document and the files sent for it, in the order of their descriptors."""

    path: str = field(metadata=_PATH)
    names: tuple[str, ...] = field(metadata=rule(count_max=DESCRIPTORS_CALL_MAX))


@dataclass(frozen=True, slots=True)
class ApplyParams:
    """A delta document and what it names.

    Attributes:
        document: its text; None when it is the first descriptor.
        format: yaml or json.
        source: how errors name the document.
        model: for documents that do not name their graph.
        files: what the descriptors are.
    """

    document: str | None = None
    format: str = field(default="yaml", metadata=rule(pattern="yaml|json"))
    source: str = field(default="delta", metadata=_PATH)
    model: str | None = field(default=None, metadata=_NAME)
    dry_run: bool = False
    files: tuple[SentPath, ...] = field(default=(), metadata=rule(count_max=DESCRIPTORS_CALL_MAX))


@dataclass(frozen=True, slots=True)
class LoadParams:
    """A bundle's files, in the order of their descriptors."""

    name: str = field(metadata=_NAME)
    files: tuple[str, ...] = field(metadata=rule(count_max=DESCRIPTORS_CALL_MAX))


@dataclass(frozen=True, slots=True)
class UnloadParams:
    """The model must be named: taking down the wrong one costs a service."""

    model: str = field(metadata=_NAME)


@dataclass(frozen=True, slots=True)
class RollbackParams:
    """`revision` is one that is still kept."""

    revision: int = field(metadata=rule(low=0))
    model: str | None = field(default=None, metadata=_NAME)


@dataclass(frozen=True, slots=True)
class ForkParams:
    """`name` is the new one."""

    name: str = field(metadata=_NAME)
    model: str | None = field(default=None, metadata=_NAME)


async def apply(task: Task, params: ApplyParams) -> Answer:
    """Applies a delta, or with `dry_run` says what it would do."""
    descriptors = task.take_descriptors()
    host = task.context.host
    try:
        delta, files = await task.lanes.wait.run(lambda: _received(params, descriptors, host))
    except GraphoptError as error:
        close_all(descriptors)
        _log_rejected(task, params.model or "", None, error, params.dry_run)
        raise
    try:
        model = task.find(_target(delta, params.model))
        run = _dry_run if params.dry_run else _apply
        act = task.lanes.look.run if params.dry_run else task.lanes.change.run
        result, revision = await act(lambda: run(task, model, delta, files))
    except GraphoptError as error:
        files.close()  # where the lane was full; closing twice does nothing
        # The engine has logged what it refused in `apply`, except a reused id.
        known = delta.graph or params.model or ""
        if params.dry_run or not _is_logged(error, task.revision):
            _log_rejected(task, known, delta.id, error, params.dry_run)
        raise
    task.made_revision = revision
    return Answer({"model": model.name, "dry_run": params.dry_run, **result})


async def rollback(task: Task, params: RollbackParams) -> Answer:
    """Makes a new revision that equals an old one."""
    try:
        model = task.find(params.model)
        model.past.graph_at(params.revision)  # the engine looks again, under its lock
    except GraphoptError as error:
        _log_rejected(task, params.model or "", None, error, False)
        raise
    applied = await task.lanes.change.run(_by(task, lambda: model.rollback(params.revision)))
    task.made_revision = applied.revision
    return Answer({"model": model.name, **asdict(applied)})


async def fork(task: Task, params: ForkParams) -> Answer:
    """Makes a second live model out of one."""
    host = task.context.host
    try:
        source = task.find(params.model)
        new = await task.lanes.change.run(_by(task, lambda: host.fork(source.name, params.name)))
    except GraphoptError as error:
        _log_refused(task, params.name, error)
        raise
    task.made_revision = new.revision
    return Answer({"model": new.name, "from_model": source.name, "revision": new.revision})


async def load(task: Task, params: LoadParams) -> Answer:
    """Loads a bundle under a name."""
    descriptors = task.take_descriptors()
    host = task.context.host
    try:
        if params.name in host.models():  # before gigabytes are read
            raise ModelExistsError(
                f"a model {params.name!r} is loaded already",
                where=params.name,
                remedy="unload it, or choose another name",
            )
        graph = await task.lanes.wait.run(lambda: _bundle(params, descriptors))
        model = await task.lanes.change.run(_by(task, lambda: host.load(graph, params.name)))
    except GraphoptError as error:
        close_all(descriptors)
        _log_refused(task, params.name, error)
        raise
    task.made_revision = model.revision
    return Answer({"model": model.name, "revision": model.revision, "nodes": len(model.graph)})


async def unload(task: Task, params: UnloadParams) -> Answer:
    """Takes a model down; its running requests finish."""
    model = task.find(params.model)
    task.made_revision = model.revision
    await task.lanes.change.run(_by(task, lambda: task.context.host.unload(model.name)))
    return Answer({"model": model.name, "revision": model.revision})


def apply_to(host: Host, delta: Delta) -> tuple[str, Applied]:
    """Applies a delta to the model it names, or to the only one: what the spool is given."""
    name = delta.graph
    if name is None:
        loaded = sorted(host.models())
        if len(loaded) != 1:
            raise DeltaError(
                f"the delta names no graph, and {len(loaded)} are loaded",
                where="graph",
                remedy=f"write graph: NAME, one of {', '.join(loaded)}" if loaded else "load one",
            )
        (name,) = loaded
    return name, host.get(name).apply(delta)


def _received(params: ApplyParams, descriptors: list[int], host: Host) -> tuple[Delta, ExitStack]:
    """The decoded delta, and the copies of its files, open until the stack is closed."""
    with ExitStack() as stack:
        stack.callback(close_all, descriptors)  # the client's files: only their copies are used
        text: str | bytes | None = params.document
        rest = descriptors
        if text is None:
            if not descriptors:
                raise DeltaError("there is no document", where="document", remedy="send its text")
            rest = descriptors[1:]
            text = read_bounded(descriptors[0], DOCUMENT_BYTES_MAX, label=params.source)
        declared = by_path([(sent.path, sent.names) for sent in params.files], rest)
        copies = ExitStack()
        try:
            files = copies.enter_context(staged(declared))
            load = load_json if params.format == "json" else load_yaml
            document = load(text, source=params.source)
            return decode_delta(document, SentFiles(files, partial(find_constant, host))), copies
        except BaseException:
            copies.close()
            raise


def _apply(
    task: Task, model: LiveModel, delta: Delta, files: ExitStack
) -> tuple[Mapping[str, Any], int]:
    with files, acting_for(SOURCE, task.peer.uid):
        applied = model.apply(delta)
    return asdict(applied), applied.revision


def _dry_run(
    task: Task, model: LiveModel, delta: Delta, files: ExitStack
) -> tuple[Mapping[str, Any], int]:
    with files:
        found = asdict(model.dry_run(delta))
    return found | {"nodes": list(found["nodes"]), "blocks": list(found["blocks"])}, model.revision


def _bundle(params: LoadParams, descriptors: list[int]) -> Any:
    try:
        return load_bundle(bundle_parts(params.files, descriptors), mapped=False)
    finally:
        close_all(descriptors)


def _target(delta: Delta, model: str | None) -> str | None:
    if delta.graph is not None and model is not None and delta.graph != model:
        raise DeltaError(
            f"the delta is for graph {delta.graph!r}, the call for {model!r}",
            where="graph",
            remedy="leave one of them out",
        )
    return delta.graph or model


def _by(task: Task, work: Callable[[], Any]) -> Callable[[], Any]:
    def act() -> Any:
        with acting_for(SOURCE, task.peer.uid):
            return work()

    return act


def _is_logged(error: GraphoptError, revision: int | None) -> bool:
    """Whether `LiveModel.apply` has said it: it does, from the moment the model was found."""
    return revision is not None and not isinstance(error, DuplicateDeltaError | BusyError)


def _log_rejected(
    task: Task, graph: str, delta_id: str | None, error: GraphoptError, dry_run: bool
) -> None:
    emit(
        "delta.rejected",
        graph=graph,
        delta_id=delta_id,
        revision=task.revision,
        code=error.code,
        message=error.message,
        where=error.where or None,
        remedy=error.remedy or None,
        detail=[list(pair) for pair in error.detail] or None,
        source=SOURCE,
        peer_uid=task.peer.uid,
        dry_run=dry_run or None,
    )


def _log_refused(task: Task, graph: str, error: GraphoptError) -> None:
    emit(
        "model.refused",
        graph=graph,
        code=error.code,
        message=error.message,
        where=error.where or None,
        remedy=error.remedy or None,
        detail=[list(pair) for pair in error.detail] or None,
        source=SOURCE,
        peer_uid=task.peer.uid,
    )
