"""Which regions to hand to which runtimes; runs in the builder process (law 4).

`layout.py` says where a graph may be parted, `proposal.py` which ways of running it are worth building
and measuring, `variants.py` what artifacts each takes and `support.py` what a runtime can run. With a
cost model `planning.py` finds the cheapest plan (`block_table.py`, `chain_tree.py`, `pricing.py`),
`forecast.py` keeps it along deltas, and `ranking.py` orders proposals by it. What is proposed is
measured; the forecast decides nothing alone.
"""

from graphopt.planner.proposal import foresee, propose

__all__ = ["foresee", "propose"]
