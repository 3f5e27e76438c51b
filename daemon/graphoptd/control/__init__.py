"""The control plane: a Unix socket over which people and programs change and watch live models.

The client shares `wire`, `sendable` and `opening` with the service and must start quickly, so this
package loads the rest, and torch with it, only when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphoptd.control.context import ControlContext
    from graphoptd.control.server import ControlServer

__all__ = ["ControlContext", "ControlServer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graphoptd.control' has no attribute {name!r}")
    module = "context" if name == "ControlContext" else "server"
    return getattr(import_module(f"graphoptd.control.{module}"), name)
