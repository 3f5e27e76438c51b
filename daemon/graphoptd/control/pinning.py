"""Methods that pin a model and take its pin away.

The owner of a pin is whoever the kernel says is calling, never a name in the call. A pin is answered
when it is in force, or at the latest after `IN_FORCE_S`: the background then is at something long,
and gets to it next.
"""

import pwd
from collections.abc import Callable
from concurrent.futures import TimeoutError as WaitTimeoutError
from dataclasses import dataclass, field

from graphopt.documents import rule
from graphopt.engine.live import LiveModel
from graphopt.engine.pins import DURATION_MAX_S, TEXT_CHARS_MAX
from graphopt.limits import NAME_CHARS_MAX
from graphoptd.control.context import acting_for
from graphoptd.control.looks import pin_row
from graphoptd.control.task import Answer, Task

SOURCE = "control"
IN_FORCE_S = 5.0  # a plan being warmed, or an artifact being loaded, takes as long at worst
_TIERS_MAX = 16  # there are half a dozen
_NAME = rule(chars_max=NAME_CHARS_MAX)


@dataclass(frozen=True, slots=True)
class PinParams:
    """How long, why, and what the better path may still use.

    Attributes:
        for_s: seconds until the pin ends by itself.
        tiers: those the better path may use besides `eager`; None holds the plan as it is.
    """

    for_s: float = field(metadata=rule(low=1, high=DURATION_MAX_S))
    reason: str = field(metadata=rule(chars_max=TEXT_CHARS_MAX))
    tiers: tuple[str, ...] | None = field(default=None, metadata=rule(count_max=_TIERS_MAX))
    model: str | None = field(default=None, metadata=_NAME)


@dataclass(frozen=True, slots=True)
class UnpinParams:
    """The model whose pin goes."""

    model: str | None = field(default=None, metadata=_NAME)


async def pin(task: Task, params: PinParams) -> Answer:
    """Holds a model's plan, or keeps it to some tiers, for a while."""
    model, better = task.find(params.model), task.context.host.better

    def act(owner: str) -> None:
        better.pin(model.name, owner, params.reason, params.for_s, params.tiers)

    return await _done(task, model, act)


async def unpin(task: Task, params: UnpinParams) -> Answer:
    """Takes the pin of a model away."""
    model, better = task.find(params.model), task.context.host.better

    def act(owner: str) -> None:
        better.unpin(model.name, owner)

    return await _done(task, model, act)


async def _done(task: Task, model: LiveModel, act: Callable[[str], None]) -> Answer:
    """Runs `act` as the caller, waits until the background has heard of it, and says what runs."""
    host = task.context.host

    def run() -> None:
        with acting_for(SOURCE, task.peer.uid):
            act(user_name(task.peer.uid))

    def wait() -> bool:
        try:
            host.reach_background().result(IN_FORCE_S)
        except WaitTimeoutError:
            return False
        return True

    await task.lanes.change.run(run)
    in_force = await task.lanes.wait.run(wait)
    return Answer(
        {"model": model.name, "pin": pin_row(task.context, model.name), "in_force": in_force}
        | {"plan_id": model.slot.plan.id, "tiers": model.slot.plan.tiers()}
    )


def user_name(uid: int) -> str:
    """The name of a user, or the number of one that has none. May wait for a user database."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
