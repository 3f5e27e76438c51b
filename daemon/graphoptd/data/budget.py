"""A bound on the bytes of all requests that are being read, decoded or computed at the same time.

Without it a hundred clients, each within its own limit, would still take all memory. A request
leases bytes as they become known and gives them back when it has been answered. The codec thread
leases too (decompression), hence the lock.
"""

from threading import Lock

from graphopt.errors import BusyError


class ByteBudget:
    """Bytes that may be in flight at once."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self._lock = Lock()

    def lease(self) -> "Lease":
        """An empty lease; grow it, then release it."""
        return Lease(self)

    def take(self, n_bytes: int) -> None:
        """Raises BusyError when that many bytes are not free; nothing is taken then."""
        with self._lock:
            if self.used_bytes + n_bytes > self.total_bytes:
                raise BusyError(
                    f"requests in flight hold {self.used_bytes} of {self.total_bytes} bytes",
                    where="inflight_bytes_max",
                    remedy="retry later, or raise the limit",
                )
            self.used_bytes += n_bytes

    def give(self, n_bytes: int) -> None:
        """Return bytes that were taken."""
        with self._lock:
            self.used_bytes -= n_bytes


class Lease:
    """The bytes one request holds."""

    __slots__ = ("_budget", "held_bytes")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.held_bytes = 0

    def grow(self, n_bytes: int) -> None:
        """Hold that many bytes more; raises BusyError."""
        self._budget.take(n_bytes)
        self.held_bytes += n_bytes

    def release(self) -> None:
        """Give everything back; calling it again does nothing."""
        held, self.held_bytes = self.held_bytes, 0
        if held:
            self._budget.give(held)
