"""How long each step of a plan takes, one after the other on one input.

On the calling thread, which must be one that serves no requests. A request that comes ends it at the
next step, so that it meets at most one step of ours. Deliberately absent: what the figures are for.
"""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from graphopt.executor.plan import Plan, run_steps

ROUNDS = 5


def time_steps(
    plan: Plan,
    inputs: Mapping[str, torch.Tensor],
    now_s: Callable[[], float],
    is_disturbed: Callable[[], bool],
    budget_s: float,
) -> tuple[list[float], dict[str, int], int] | None:
    """Medians in seconds of the steps, the sizes of the symbols, and how many rounds they are of.

    None when it was disturbed, or when `budget_s` does not suffice for two rounds after the first,
    which does not count. Raises what a step raises.
    """
    figures: list[list[float]] = [[] for _ in plan.steps]
    sizes: dict[str, int] = {}
    start_s = now_s()
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            env, symbols = plan.bind(inputs)
            sizes = dict(symbols)
            for step, took in zip(plan.steps, figures, strict=True):
                if is_disturbed():
                    return None
                _time(step, env, symbols, now_s, took if turn else None)
            spent_s = now_s() - start_s
            if turn >= 2 and spent_s >= budget_s:
                break
            if turn < 2 and spent_s * 3 / (turn + 1) > budget_s:
                return None
    rounds = len(figures[0]) if figures else 0
    return [median(took) for took in figures], sizes, rounds


def _time(
    step: Any,
    env: dict[str, Any],
    symbols: Mapping[str, int],
    now_s: Callable[[], float],
    into: list[float] | None,
) -> None:
    begun_s = now_s()
    run_steps((step,), env, symbols)
    if into is not None:
        into.append(now_s() - begun_s)
