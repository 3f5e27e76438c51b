"""The builder: a process beside the serving one, in which regions are built, loaded and verified.

`python -m graphopt.builder` is started by `graphopt.engine.builder_link` and talks JSON lines over a
pair of pipes; `records.py` has the words of that talk. It holds each model's graph and facts
(`models.py`: the text once, then deltas), runs jobs (`workshop.py`) on values that cross into a
region in real requests (`boundaries.py`), one at a time (`serve.py`), and gives way to everything
else on the host (`pace.py`). What crashes here costs nobody a request.

Deliberately absent: any measurement of latency, which means nothing beside a server, and
multiprocessing, which breaks scripts without a main guard.
"""
