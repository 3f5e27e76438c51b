"""One call being answered: who asks, what came with it, which model it is about, what it gets."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.engine.live import LiveModel
from graphopt.errors import ModelNotFoundError
from graphoptd.control.context import ControlContext
from graphoptd.control.descriptors import close_all
from graphoptd.control.levels import Level, Peer
from graphoptd.control.wire import Call
from graphoptd.control.work import Lanes


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method answers.

    Attributes:
        result: JSON values by name.
        rows: the key of `result` whose list may be sent in parts; empty when there is none.
    """

    result: Mapping[str, Any] = field(default_factory=dict)
    rows: str = ""


class Task:
    """A call under way.

    Attributes:
        level: what the peer may do.
        stopping: set when the service goes down; streams end then.
        part: sends a part of the answer, for calls with `more`.
        readable: returns when the client sends something or leaves.
        in_background: runs something that nobody waits for; its typed errors are dropped.
        made_revision: the revision that this call made.
        revision: of the model the call is about, for the reply's envelope, errors included.
    """

    def __init__(
        self,
        call: Call,
        peer: Peer,
        level: Level,
        context: ControlContext,
        lanes: Lanes,
        stopping: asyncio.Event,
        descriptors: list[int],
        part: Callable[[Mapping[str, Any]], Awaitable[None]],
        readable: Callable[[], Awaitable[None]],
        in_background: Callable[[Awaitable[Any]], None],
    ) -> None:
        self.call = call
        self.peer = peer
        self.level = level
        self.context = context
        self.lanes = lanes
        self.stopping = stopping
        self.part = part
        self.readable = readable
        self.in_background = in_background
        self._model: LiveModel | None = None
        self._descriptors = descriptors
        self.made_revision: int | None = None

    @property
    def revision(self) -> int | None:
        """The revision to name in the reply: the one a change made, else the current one."""
        if self.made_revision is not None:
            return self.made_revision
        return self._model.revision if self._model is not None else None

    def find(self, name: str | None) -> LiveModel:
        """The model `name`; without a name the only one. ModelNotFoundError lists what is loaded."""
        host = self.context.host
        if name is None:
            loaded = host.models()
            if len(loaded) != 1:
                raise ModelNotFoundError(
                    f"{len(loaded)} models are loaded" if loaded else "no model is loaded",
                    where="model",
                    remedy=f"name one of {', '.join(sorted(loaded))}"
                    if loaded
                    else "load one: graphoptctl load NAME BUNDLE",
                )
            (name,) = loaded
        self._model = host.get(name)
        return self._model

    def take_descriptors(self) -> list[int]:
        """The open files of the call; whoever takes them closes them, on the thread that reads."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        """Closes what the method did not take."""
        close_all(self.take_descriptors())
