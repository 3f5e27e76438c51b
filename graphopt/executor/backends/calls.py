"""How a loaded artifact is called: reads in and exits out without copies, by any number of threads.

A *slot* is one run in flight: an infer request, a binding. Slots are taken from a pool and put
back. Memory is bound by address: a tensor that lies where the last one lay is not bound again, and a
slot keeps no read alive. A result lies where its slot has written it, and the slot is bound to other
memory only if it is needed again while somebody holds that result (`outputs`): there are twice as many
slots as calls were ever made at once, since a caller lets go of a result when he has the next one.
What is small is copied instead, which costs less than a binding.

A request finds its code and data evicted by the weights of the one before, so that whatever is touched
here costs 5 to 20 times what it does in a loop by itself: few and plain calls are the rule.

Deliberately absent: runtimes; each brings its own slot.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
import torch

from graphopt.constants import TORCH_DTYPES
from graphopt.dims import evaluate
from graphopt.errors import RequestError
from graphopt.executor.backends.artifact import Sheet
from graphopt.executor.backends.outputs import Outputs
from graphopt.executor.backends.translate import Guard
from graphopt.types import TensorType

# A copy of 16 KiB takes a microsecond, a binding two or three
STAGED_BYTES_MAX = 16 << 10
# Up to so many integers are looked at as a list: behind 16 MB of weights 33 us for 64 of them, 92 by numpy
FEW = 512
_Guard = tuple[int, int, int]  # read, low, high
SHAPES_KEPT = 256  # of exits by symbol values: one small tuple each


class Slot(Protocol):
    """One run in flight. The memory behind an address lives until `run` has returned."""

    def bind_read(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        """Read `index`, and after the reads the scalars, lies at `address`."""

    def bind_exit(self, index: int, address: int, shape: tuple[int, ...]) -> None:
        """Exit `index` is to be written to `address`."""

    @property
    def run(self) -> Callable[[], object]:
        """What computes the exits from the reads; looked up once."""


class _Lane:
    """A slot with what is bound to it."""

    __slots__ = (
        "bound_exits", "bound_reads", "bounds", "outputs", "run", "slot", "staged_exits",
        "staged_reads",
    )  # fmt: skip

    def __init__(self, slot: Slot, n_reads: int, outputs: list[Outputs]) -> None:
        self.slot = slot
        self.run = slot.run
        self.bound_reads: list[Any] = [None] * n_reads
        self.bound_exits: list[Any] = [None] * len(outputs)
        self.outputs = outputs
        self.staged_reads: list[tuple[int, torch.Tensor]] = []
        self.staged_exits: list[tuple[int, torch.Tensor]] = []
        self.bounds: _Bounds | None = None

    def is_free(self) -> bool:
        """Whether nobody holds the last results: a run writes the next ones to the same places."""
        for each in self.outputs:  # noqa: SIM110 - a generator is one more frame
            if not each.is_free():
                return False
        return True


class _Bounds:
    """Staged integer reads side by side, and what each element of them must keep within.

    Many are looked at in one pass: a value is in bounds when its distance from the lower one, taken as
    an unsigned number, is no more than the distance of the upper one. Three calls of numpy, 3 us where
    a minimum and a maximum of each of three reads take 20, and 60 with cold caches.
    """

    __slots__ = ("_beyond", "_distance", "_few", "_low", "_span", "_unsigned", "_values", "parts")

    def __init__(self, shapes: Sequence[tuple[int, ...]], guards: Sequence[_Guard]) -> None:
        sizes = [prod(shape) for shape in shapes]
        self._values = np.zeros(sum(sizes), np.int64)
        starts = np.cumsum([0, *sizes])
        ends = zip(starts[:-1].tolist(), starts[1:].tolist(), guards, strict=True)
        few = [(start, end, low, high) for start, end, (_, low, high) in ends if start < end]
        self._few = few if sum(sizes) <= FEW else None
        whole = torch.from_numpy(self._values)
        self.parts = [
            whole[start : start + size].view(shape)
            for start, size, shape in zip(starts[:-1].tolist(), sizes, shapes, strict=True)
        ]
        lows = [low for _, low, _ in guards]
        spans = [high - low for _, low, high in guards]
        self._low = np.repeat(np.array(lows, np.int64), sizes)
        self._span = np.repeat(np.array(spans, np.uint64), sizes)
        self._distance = np.empty_like(self._values)
        self._unsigned = self._distance.view(np.uint64)
        self._beyond = np.empty(len(self._values), np.bool_)

    def are_kept(self) -> bool:
        """Whether all values are in bounds."""
        if self._few is not None:
            values = self._values.tolist()
            for start, end, low, high in self._few:
                part = values[start:end]
                if min(part) < low or max(part) > high:
                    return False
            return True
        np.subtract(self._values, self._low, out=self._distance)  # wraps, as it should
        np.greater(self._unsigned, self._span, out=self._beyond)
        return not self._beyond.any()


class Calls:
    """The function of a loaded artifact.

    Args:
        sheet: how it is called.
        new_slot: makes a slot; called where all are in use.
        guards: bounds that integer reads must keep; a RequestError names the read that does not.
    """

    def __init__(self, sheet: Sheet, new_slot: Callable[[], Slot], guards: Sequence[Guard]) -> None:
        self._new_slot = new_slot
        merged = _merged(guards)
        self._scalars = sheet.scalars
        self._n_reads = len(sheet.reads)
        self._n_symbols = sheet.n_symbols
        self._reads = [_plain(type_) for type_ in sheet.read_types()]
        self._read_dtypes = [type_.dtype for type_ in sheet.read_types()]
        self._exit_types = sheet.computed_types()
        self._echoes = sheet.echoes
        self._dtypes = [TORCH_DTYPES[type_.dtype] for type_ in self._exit_types]
        self._exits = [_plain(type_) for type_ in self._exit_types]
        self._fixed = [shape or () for shape in self._exits]
        self._is_fixed = None not in self._exits
        self._shapes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        self._stage_read = [
            shape is not None and _n_bytes(shape, type_.dtype) <= STAGED_BYTES_MAX
            for shape, type_ in zip(self._reads, sheet.read_types(), strict=True)
        ]
        self._stage_exit = [
            shape is not None and _n_bytes(shape, type_.dtype) <= STAGED_BYTES_MAX
            for shape, type_ in zip(self._exits, self._exit_types, strict=True)
        ]
        # Small reads of fixed shape are looked at where they are staged, the others one by one
        self._staged_guards = [
            guard
            for guard in merged
            if self._stage_read[guard[0]] and self._read_dtypes[guard[0]] == "i64"
        ]
        self._guards = [guard for guard in merged if guard not in self._staged_guards]
        n_reads = self._n_reads + len(self._scalars)
        is_staged = [*self._stage_read, *[False] * len(self._scalars)]
        self._binds_reads = [i for i in range(n_reads) if not is_staged[i]]
        self._binds_exits = [i for i, staged in enumerate(self._stage_exit) if not staged]
        self._pool: list[_Lane] = []

    def __call__(self, *args: Any) -> Any:
        """See `Loaded.function`."""
        for index, low, high in self._guards:
            _check(index, args[index], low, high)
        try:
            lane = self._pool.pop()  # atomic; two threads never get the same
        except IndexError:
            lane = self._new_lane()
        if self._binds_exits and not lane.is_free():
            lane = self._free_lane(lane)
        for index, staged in lane.staged_reads:
            staged.copy_(args[index])
        if lane.bounds is not None and not lane.bounds.are_kept():
            self._pool.append(lane)
            for index, low, high in self._staged_guards:
                _check(index, args[index], low, high)
        held = self._bind_reads(lane, args) if self._binds_reads else None
        outs = self._bind_exits(lane, args) if self._binds_exits else []
        lane.run()
        for index, staged in lane.staged_exits:
            outs.insert(index, staged.clone())
        for position, read in self._echoes:
            outs.insert(position, args[read].clone(memory_format=torch.contiguous_format))
        del held
        self._pool.append(lane)  # after a failure it is not: its state is unknown
        return outs[0] if len(outs) == 1 else tuple(outs)

    def _free_lane(self, held: _Lane) -> _Lane:
        """One whose last results nobody holds in the place of `held`, which is put back; else `held`.

        A new one where all others are in use, so that there are two at most for each call at once.
        """
        try:
            other = self._pool.pop()
        except IndexError:
            other = self._new_lane()
        lane, back = (other, held) if other.is_free() else (held, other)
        self._pool.append(back)
        return lane

    def _bind_exits(self, lane: _Lane, args: Sequence[Any]) -> list[Any]:
        """Tensors for the exits that are not staged, in order, bound."""
        shapes = self._fixed if self._is_fixed else self._shapes_for(tuple(args[self._n_reads :]))
        outs = []
        for index in self._binds_exits:
            shape = shapes[index]
            out = lane.outputs[index].take(shape)
            key = (out.data_ptr(), shape)
            if lane.bound_exits[index] != key:
                lane.slot.bind_exit(index, *key)
                lane.bound_exits[index] = key
            outs.append(out)
        return outs

    def _bind_reads(self, lane: _Lane, args: Sequence[Any]) -> list[Any]:
        """Binds reads and scalars; what is returned must live until the run is over."""
        held: list[Any] = []
        bound = lane.bound_reads
        for index in self._binds_reads:
            if index >= self._n_reads:
                tensor = torch.tensor([args[self._n_reads + self._scalars[index - self._n_reads]]])
                held.append(tensor)
            else:
                tensor = args[index]
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                held.append(tensor)
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if bound[index] != key:
                lane.slot.bind_read(index, *key)
                bound[index] = key
        return held

    def _shapes_for(self, symbols: tuple[int, ...]) -> list[tuple[int, ...]]:
        found = self._shapes.get(symbols)
        if found is None:
            values = {f"s{i}": size for i, size in enumerate(symbols)}
            found = [
                tuple(evaluate(dim, values) for dim in type_.shape) for type_ in self._exit_types
            ]
            if len(self._shapes) >= SHAPES_KEPT:
                self._shapes.clear()
            self._shapes[symbols] = found
        return found

    def _new_lane(self) -> _Lane:
        n_reads = self._n_reads + len(self._scalars)
        outputs = [
            Outputs(dtype, is_fixed=shape is not None)
            for dtype, shape in zip(self._dtypes, self._exits, strict=True)
        ]
        lane = _Lane(self._new_slot(), n_reads, outputs)
        guarded: dict[int, torch.Tensor] = {}
        if self._staged_guards:
            indices = [index for index, _, _ in self._staged_guards]
            lane.bounds = _Bounds([self._reads[i] or () for i in indices], self._staged_guards)
            guarded = dict(zip(indices, lane.bounds.parts, strict=True))
        for index, shape in enumerate(self._reads):
            if self._stage_read[index] and shape is not None:
                dtype = TORCH_DTYPES[self._read_dtypes[index]]
                staged = guarded.get(index, torch.empty(shape, dtype=dtype))
                lane.staged_reads.append((index, staged))
                lane.slot.bind_read(index, staged.data_ptr(), shape)
        for index, is_staged in enumerate(self._stage_exit):
            if is_staged:
                staged = torch.empty(self._fixed[index], dtype=self._dtypes[index])
                lane.staged_exits.append((index, staged))
                lane.slot.bind_exit(index, staged.data_ptr(), self._fixed[index])
        return lane


def _plain(type_: TensorType) -> tuple[int, ...] | None:
    shape = tuple(dim for dim in type_.shape if isinstance(dim, int))
    return shape if len(shape) == type_.rank else None


def _n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    n_bytes = TORCH_DTYPES[dtype].itemsize
    for size in shape:
        n_bytes *= size
    return n_bytes


def _merged(guards: Sequence[Guard]) -> tuple[_Guard, ...]:
    """One pair of bounds a read: the narrower of each."""
    bounds: dict[int, tuple[int, int]] = {}
    for guard in guards:
        low, high = bounds.get(guard.read, (guard.low, guard.high))
        bounds[guard.read] = max(low, guard.low), min(high, guard.high)
    return tuple((read, low, high) for read, (low, high) in bounds.items())


def _check(index: int, tensor: torch.Tensor, low: int, high: int) -> None:
    if not tensor.numel():
        return
    least, most = (int(value) for value in torch.aminmax(tensor))
    if least < low or most > high:
        raise RequestError(
            f"read {index} holds {least if least < low else most}, outside {low} to {high}",
            where=f"read {index}",
            remedy="an index must lie inside its table",
        )
