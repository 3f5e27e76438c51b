"""Which regions to hand to which runtimes; runs in the builder process (law 4).

`layout.py` says where a graph may be parted, `proposal.py` which ways of running it are worth
building and measuring. Deliberately absent: a cost model. What is proposed is measured.
"""

from graphopt.planner.proposal import propose

__all__ = ["propose"]
