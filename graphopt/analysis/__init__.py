"""Derived facts: functions of the graph, recomputed only where a change reaches them."""
