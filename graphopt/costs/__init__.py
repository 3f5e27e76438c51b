"""What regions cost: how much work they are, and the contract of a model that says how long it takes.

`op_work.py` counts one node, `work.py` a region, `model.py` is what the engine asks a cost model, and
`plan_cost.py` adds up a plan. Deliberately absent: any figure of a host; those are in `cost_models`.
"""
