"""The data plane: the Open Inference Protocol v2 over HTTP, on TCP and on a Unix socket.

    socket -> http (deadlines, caps) -> app (routes, body) -> decode -> batcher -> Served.submit or run
                                                           -> encode -> socket

Everything but the executors runs on one asyncio loop, and so do the quickest runs (`inline`). So no
state here needs a lock except the byte budget, which the codec thread shares. The engine is known
only through the Protocols of `served`.

Deliberately absent: gRPC, ensembles, sequence and decoupled models, BYTES tensors, the trace and
logging extensions, CUDA shared memory, TLS (a proxy or the Unix socket's permissions guard the
port).
"""

from graphoptd.data.served import (
    Directory,
    IndexEntry,
    Result,
    Served,
    Signature,
    TensorSpec,
    Timed,
    timed,
)
from graphoptd.data.server import DataServer
from graphoptd.data.settings import DataSettings

__all__ = [
    "DataServer",
    "DataSettings",
    "Directory",
    "IndexEntry",
    "Result",
    "Served",
    "Signature",
    "TensorSpec",
    "Timed",
    "timed",
]
