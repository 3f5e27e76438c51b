"""The methods of the control socket: name, level, parameters, function.

A closed table: `hello` and `help` print it, the server looks calls up in it, and the level that a
method needs stands beside its name and nowhere else.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from graphopt.documents import decode, from_value
from graphopt.errors import GraphoptError, ProtocolError, nearest
from graphoptd.control import changes, costing, looks, pinning, streams
from graphoptd.control.levels import Level
from graphoptd.control.looks import NoParams
from graphoptd.control.task import Answer, Task
from graphoptd.control.wire import API_MAX, API_MIN, Call
from graphoptd.events import emit


@dataclass(frozen=True, slots=True)
class Method:
    """What the server needs to know of a method; its docstring is its help."""

    level: Level
    params: type[Any]
    run: Callable[[Task, Any], Awaitable[Answer]]

    @property
    def says(self) -> str:
        """One line of help."""
        return (self.run.__doc__ or "").splitlines()[0]


@dataclass(frozen=True, slots=True)
class ReloadParams:
    """`wait`: answer when the configuration is in force, or refused."""

    wait: bool = field(default=True)


def find_method(call: Call) -> Method:
    """The method a call names. ProtocolError with the nearest names."""
    method = METHODS.get(call.method.replace("-", "_"))
    if method is None:
        remedy = nearest(call.method, METHODS) or "help lists the methods"
        raise ProtocolError(f"no method {call.method!r}", where="method", remedy=remedy)
    return method


def decode_params(method: Method, call: Call) -> Any:
    """The parameters as the method's record. ProtocolError listing every fault."""
    try:
        return decode(from_value(dict(call.params), source="params"), method.params)
    except GraphoptError as error:
        raise ProtocolError(
            error.message,
            where=error.where,
            remedy=error.remedy or f"see help: {call.method} takes {_names(method) or 'nothing'}",
            detail=error.detail,
        ) from None


async def hello(task: Task, params: NoParams) -> Answer:
    """What this service speaks, and what it lets the caller do."""
    allowed = [name for name, method in METHODS.items() if method.level <= task.level]
    return Answer(
        {
            "service": "graphoptd",
            "version": task.context.version,
            "api": [API_MIN, API_MAX],
            "capabilities": ["descriptors", "more"],
            "level": task.level.word,
            "methods": allowed,
        }
    )


async def help_(task: Task, params: NoParams) -> Answer:
    """The methods with their levels and parameters."""
    rows = [
        {"method": name, "level": each.level.word, "params": _names(each), "says": each.says}
        for name, each in METHODS.items()
    ]
    return Answer({"methods": rows}, rows="methods")


async def reload(task: Task, params: ReloadParams) -> Answer:
    """Takes the configuration over, whole or not at all."""
    if not params.wait:
        # The service logs how it ended; nobody waits for the answer.
        task.in_background(task.context.reload())
        return Answer({"started": True})
    done = await task.context.reload()
    kept = {"applied": done.live, "needs_restart": done.restart, "kept_by_state": done.state}
    return Answer({name: list(keys) for name, keys in kept.items()})


def log_denied(task: Task, method: Method) -> None:
    """The line of the log that a refusal for want of a level leaves."""
    model = task.call.params.get("model")
    emit(
        "control.denied",
        method=task.call.method,
        level=method.level.word,
        peer_uid=task.peer.uid,
        peer_pid=task.peer.pid or None,
        graph=model if isinstance(model, str) else None,
        request_id=None if task.call.id is None else str(task.call.id),
    )


def _names(method: Method) -> str:
    return ", ".join(each.name for each in fields(method.params))


METHODS: Mapping[str, Method] = {
    "hello": Method(Level.READ, NoParams, hello),
    "help": Method(Level.READ, NoParams, help_),
    "status": Method(Level.READ, NoParams, looks.status),
    "models": Method(Level.READ, NoParams, looks.models),
    "nodes": Method(Level.READ, looks.NodesParams, looks.nodes),
    "show": Method(Level.READ, looks.ShowParams, looks.show),
    "history": Method(Level.READ, looks.ModelParams, looks.history),
    "explain": Method(Level.READ, looks.ModelParams, looks.explain),
    "draw": Method(Level.READ, looks.ModelParams, looks.draw),
    "diff": Method(Level.READ, looks.DiffParams, looks.diff),
    "new_delta": Method(Level.READ, looks.NewDeltaParams, looks.new_delta),
    "cost": Method(Level.READ, costing.CostParams, costing.cost),
    "top": Method(Level.READ, streams.TopParams, streams.top),
    "logs": Method(Level.READ, streams.LogsParams, streams.logs),
    "apply": Method(Level.OPERATE, changes.ApplyParams, changes.apply),
    "rollback": Method(Level.OPERATE, changes.RollbackParams, changes.rollback),
    "fork": Method(Level.OPERATE, changes.ForkParams, changes.fork),
    "pin": Method(Level.OPERATE, pinning.PinParams, pinning.pin),
    "unpin": Method(Level.OPERATE, pinning.UnpinParams, pinning.unpin),
    "settle": Method(Level.OPERATE, streams.SettleParams, streams.settle),
    "load": Method(Level.ADMIN, changes.LoadParams, changes.load),
    "unload": Method(Level.ADMIN, changes.UnloadParams, changes.unload),
    "reload": Method(Level.ADMIN, ReloadParams, reload),
    "calibrate": Method(Level.ADMIN, costing.CalibrateParams, costing.calibrate),
}
