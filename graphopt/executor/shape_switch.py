"""One function for every shape: artifacts made for hot shapes, and one that takes the others.

The sizes of the dynamic dims decide, which a step gets as its last arguments. So a plan stays one
row of steps whatever shapes arrive, and a shape never seen before is served at once.
"""

from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]


class ShapeSwitch:
    """Calls the variant made for the sizes at hand, else `any_shape`; about 0.2 us a call."""

    __slots__ = ("_count", "any_shape", "variants")

    def __init__(
        self, count: int, any_shape: Function, variants: Mapping[tuple[int, ...], Function]
    ) -> None:
        self._count = count  # of symbols, the last arguments
        self.any_shape = any_shape
        self.variants = dict(variants)

    def __call__(self, *args: Any) -> Any:
        """The region's outputs; arguments are its reads, then the values of its symbols."""
        return self.variants.get(args[-self._count :], self.any_shape)(*args)


def closed_over(function: Function, constants: tuple[Any, ...], count: int) -> Function:
    """`function(*reads, *constants, *symbols)` as one of reads and `count` symbols alone."""
    if not count:
        return lambda *args: function(*args, *constants)

    def call(*args: Any) -> Any:
        return function(*args[:-count], *constants, *args[-count:])

    return call
