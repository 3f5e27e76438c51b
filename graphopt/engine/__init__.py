"""The engine: live models, composed from graph, facts, plans, threads and state."""

from graphopt.engine.engine import Engine
from graphopt.engine.host import Host
from graphopt.engine.live import LiveModel
from graphopt.engine.records import (
    Applied,
    DryRun,
    EngineSettings,
    ModelLimits,
    Result,
    RevisionInfo,
)

__all__ = [
    "Applied",
    "DryRun",
    "Engine",
    "EngineSettings",
    "Host",
    "LiveModel",
    "ModelLimits",
    "Result",
    "RevisionInfo",
]
