"""What a block costs by how its two cuts are crossed: a table whose products cost a chain of blocks.

    state 0    CUT      the value lies in the caller's memory, as its type says
    state 1    JOINED   a step of the live path goes on across the cut (`executor.runs`)
    state 2+k  inside   a region on way k goes on across the cut

Entry [i, j] of a table is the least time of a block that is entered in state i and left in state j,
infinite where that cannot be. A region pays for its call where it is entered from CUT, so the product
of tables in (min, +) prices every way to part a chain into regions, and the least of them is its
entry [CUT, CUT]. Method: `T[s_in, s_out]` over interface states, as in Unity (OSDI '22) and Collage
(PACT '22), whose search inside a block is left out here: a step runs whole blocks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

CUT, JOINED, INSIDE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of one block at certain sizes.

    Attributes:
        live_call_s: of a step on the live path, whatever it computes.
        live_s: of the block in such a step.
        call_s: of a region, by way.
        body_s: of the block inside a region, by way; infinite where the way cannot run it.
        footprint_bytes: what a run of it goes through.
    """

    live_call_s: float
    live_s: float
    call_s: tuple[float, ...]
    body_s: tuple[float, ...]
    footprint_bytes: int


def table_of(prices: Prices, *, is_joined: bool, is_apart: bool) -> tuple[Table, int]:
    """The table of a block, and the state that it is in if both its cuts are crossed in CUT.

    Args:
        prices: of the block.
        is_joined: whether the live path runs it in one step with the block before it, which no region
            then parts from it.
        is_apart: whether it is to stay out of regions, because deltas keep editing it.
    """
    count = INSIDE + len(prices.call_s)
    table = np.full((count, count), np.inf)
    table[CUT, CUT] = table[CUT, JOINED] = prices.live_call_s + prices.live_s
    table[JOINED, CUT] = table[JOINED, JOINED] = prices.live_s
    alone = JOINED
    if not is_apart:
        for k, (call_s, body_s) in enumerate(zip(prices.call_s, prices.body_s, strict=True)):
            state = INSIDE + k
            table[state, state] = table[state, CUT] = body_s
            table[CUT, state] = call_s + body_s
            if call_s + body_s < table[CUT, CUT]:
                table[CUT, CUT], alone = call_s + body_s, state
    table[CUT if is_joined else JOINED] = np.inf
    table.flags.writeable = False
    return table, alone


def product(first: Table, second: Table) -> Table:
    """Least times through one table and then the other."""
    found: Table = (first[:, :, None] + second[None, :, :]).min(axis=1)
    return found


def unit(count: int) -> Table:
    """The table of no block at all: every state goes on as it is."""
    table = np.full((count, count), np.inf)
    np.fill_diagonal(table, 0.0)
    return table
