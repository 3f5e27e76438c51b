"""The values that cross into a region when the model runs on a request.

The model is run eagerly up to the region. What is alive at a region's edge is kept, keyed by
everything upstream and by the request: the next layer's candidate starts there, and after an edit
everything before the edit is still good.

Deliberately absent: values of candidates. Every candidate is judged on what eager steps made.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from graphopt.builder.models import Version
from graphopt.errors import BundleError, RequestError
from graphopt.executor.plan import Plan, Step, run_steps
from graphopt.executor.samples import Sample, sample_inputs
from graphopt.safetensors_file import read_tensors

EDGES_BYTES_MAX = 256 << 20  # BERT-base at 8x128 keeps 3 MB an edge and request
REQUESTS_KEPT = 32  # files of real inputs read, of all models
SAMPLES_MAX = 4  # requests one candidate is verified on
_C128 = "c128:"


@dataclass(frozen=True, slots=True)
class Request:
    """Model inputs by name; `id` is a hash of their content."""

    id: str
    inputs: Mapping[str, torch.Tensor]
    is_made_up: bool


@dataclass(frozen=True, slots=True)
class _Edge:
    """The values alive before a step, by key."""

    env: Mapping[str, Any]
    size_bytes: int


class Boundaries:
    """Samples of regions, for any revision of any model."""

    def __init__(self, size_bytes_max: int = EDGES_BYTES_MAX) -> None:
        self._size_bytes_max = size_bytes_max
        self._size_bytes = 0
        self._edges: OrderedDict[str, _Edge] = OrderedDict()
        self._requests: OrderedDict[Path, Request] = OrderedDict()
        self.steps_run = 0  # since the start: what the cache saves shows here

    def samples(
        self,
        version: Version,
        block: str,
        reads: tuple[str, ...],
        files: Iterable[Path],
        sizes: Mapping[str, int],
    ) -> tuple[list[Sample], bool]:
        """Up to `SAMPLES_MAX` samples of the region that begins with `block`, and whether they are made up.

        Args:
            version: the revision.
            block: the first block of the region.
            reads: value keys of what the region reads, in order.
            files: real requests; what does not fit the revision or `sizes` is left out.
            sizes: of symbols, where the candidate takes no others.
        """
        found: list[Sample] = []
        for request, env, symbols in self._bound(version, files):
            if all(symbols.get(name) == size for name, size in sizes.items()):
                edge = self._edge(version.plan, block, request, env, symbols)
                found.append(Sample(tuple(edge[key] for key in reads), symbols))
            if len(found) == SAMPLES_MAX:
                break
        if found:
            return found, False
        inputs = sample_inputs(version.facts, sizes)
        env, symbols = version.plan.bind(inputs)
        edge = self._edge(version.plan, block, _digest(inputs), env, symbols)
        return [Sample(tuple(edge[key] for key in reads), symbols)], True

    def look_ahead(
        self,
        version: Version,
        blocks: Collection[str],
        files: Iterable[Path],
        is_wanted: Callable[[], bool],
    ) -> None:
        """Computes what crosses into each of `blocks`, so that after the next edit what lies before it
        is known; stops as soon as it is not `is_wanted` any more.
        """
        starts = [step.block for step in version.plan.steps if step.block in blocks]
        for request, env, symbols in islice(self._bound(version, files), SAMPLES_MAX):
            with suppress(Exception):  # the request's fault, and the next job says so
                for block in starts:
                    if not is_wanted():
                        return
                    self._edge(version.plan, block, request, env, symbols)

    def _bound(
        self, version: Version, files: Iterable[Path]
    ) -> Iterator[tuple[str, dict[str, Any], Mapping[str, int]]]:
        """The ids of the real requests that the revision takes, with their values and sizes."""
        requests = [request for path in files if (request := self._read(path)) is not None]
        for request in requests:
            with suppress(RequestError):  # the interface has changed since that request
                yield request.id, *version.plan.bind(request.inputs)

    def _edge(
        self,
        plan: Plan,
        block: str,
        request: str,
        env: Mapping[str, Any],
        symbols: Mapping[str, int],
    ) -> Mapping[str, Any]:
        """What is alive before `block`, from the model's inputs in `env`."""
        env, keys = dict(env), [request]
        for step in plan.steps:
            if step.block == block:
                break
            keys.append(_after(keys[-1], step))
        start = next((at for at in reversed(range(len(keys))) if keys[at] in self._edges), 0)
        if start:
            self._edges.move_to_end(keys[start])
            env = dict(self._edges[keys[start]].env)
        with torch.no_grad():
            run_steps(plan.steps[start : len(keys) - 1], env, symbols)
        self.steps_run += len(keys) - 1 - start
        self._keep(keys[-1], env)
        return env

    def _keep(self, key: str, env: Mapping[str, Any]) -> None:
        if key in self._edges:
            return
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in env.values()
            if isinstance(value, torch.Tensor)
        }
        edge = _Edge(dict(env), sum(storages.values()))
        if edge.size_bytes > self._size_bytes_max:
            return
        self._edges[key] = edge
        self._size_bytes += edge.size_bytes
        while self._size_bytes > self._size_bytes_max:
            self._size_bytes -= self._edges.popitem(last=False)[1].size_bytes

    def _read(self, path: Path) -> Request | None:
        """The request in a file; None when the file is gone or damaged."""
        known = self._requests.get(path)
        if known is None:
            try:
                tensors = read_tensors(path, mapped=False)
            except BundleError:
                return None
            inputs = {
                name.removeprefix(_C128): torch.view_as_complex(t) if name.startswith(_C128) else t
                for name, t in tensors.items()
            }
            known = self._requests[path] = Request(_digest(inputs), inputs, False)
            if len(self._requests) > REQUESTS_KEPT:
                self._requests.popitem(last=False)
        return known


def _after(key: str, step: Step) -> str:
    """The key of the values alive after `step`, from the key of those before it."""
    names = " ".join((*step.reads, "|", *step.writes, "|", *step.frees))
    text = f"{key} {step.block} {step.key} {step.weights} {names}"
    return blake2b(text.encode(), digest_size=20).hexdigest()


def _digest(inputs: Mapping[str, torch.Tensor]) -> str:
    hasher = sha256()
    for name, tensor in sorted(inputs.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.numel():
            hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
