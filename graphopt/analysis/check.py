"""Verify mode: recompute every fact by other means and compare.

Incremental facts are right when they are what the graph alone says. `check_facts` holds them
against `graphopt.analysis.naive` (plain graph theory over the whole graph) and against torch itself
(`graphopt.analysis.fake_run`, at two sizes of every symbol). It costs milliseconds a node: tests
run it after every step, an operator may ask for it, the live path never does.

Deliberately absent: repair. A difference is a bug of graphopt, and every one found is reported at
once.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from graphopt.analysis.blocks import CONTEXT, START
from graphopt.analysis.facts import Facts
from graphopt.analysis.fake_run import FakeRunError, fault_of, run_fake
from graphopt.analysis.regions import build_region
from graphopt.errors import FactsError
from graphopt.graph import Graph

if TYPE_CHECKING:
    from graphopt.analysis.naive import Naive

Fault = tuple[str, str]
_FAULTS_SHOWN = 50  # of one graph; one wrong block tends to show up many times


def check_facts(facts: Facts, *, sizes: tuple[Mapping[str, int], ...] | None = None) -> None:
    """Raises FactsError, listing every difference, unless `facts` are what a computation from
    scratch gives.

    Args:
        facts: the facts to check, with the graph they are about.
        sizes: the sizes of every symbol to run types at; None takes two odd and even ones within
            the symbols' ranges.
    """
    _raise("the facts are not what the graph says", facts.graph, facts_faults(facts, sizes))


def compare_facts(left: Facts, right: Facts) -> None:
    """Raises FactsError, listing every difference, unless both say the same about equal graphs.

    Labels are no part of a graph's value, so the order of unrelated nodes inside a block may
    differ.
    """
    _raise("the facts differ", left.graph, comparison_faults(left, right))


def facts_faults(
    facts: Facts, sizes: tuple[Mapping[str, int], ...] | None = None
) -> Iterator[Fault]:
    """Every difference between `facts` and a computation from scratch, as (fact, reason)."""
    from graphopt.analysis.naive import Naive, index_faults  # networkx: 0.2 s to import

    broken = list(index_faults(facts.graph))
    yield from broken
    if broken:
        return  # what follows would only repeat it
    graph, naive = facts.graph, Naive(facts.graph)
    yield from _type_faults(facts, sizes if sizes is not None else two_sizes(graph))
    yield from _map_faults("traits", dict(facts.traits), naive.traits)
    yield from _map_faults("live", dict(facts.live), {id: id in naive.live for id in graph.nodes})
    yield from _block_faults(facts, naive)
    yield from _map_faults("homes", dict(facts.homes), naive.homes)
    yield from _region_faults(facts, naive)
    readers = {str(ref): dict(homes) for ref, homes in facts.readers.items()}
    yield from _map_faults(
        "readers", readers, {str(r): dict.fromkeys(h, 1) for r, h in naive.readers().items()}
    )
    last = {str(ref): home for ref, home in facts.last_readers.items()}
    yield from _map_faults(
        "last_readers", last, {str(r): home for r, home in naive.last_readers().items()}
    )


def comparison_faults(left: Facts, right: Facts) -> Iterator[Fault]:
    """Every difference between two facts, as (fact, reason)."""
    if left.graph.digest != right.graph.digest:
        yield "graph", "the graphs differ"
        return
    for name in ("types", "traits", "live", "homes", "regions"):
        yield from _map_faults(name, dict(getattr(left, name)), dict(getattr(right, name)))
    for name in ("readers", "last_readers"):
        both = [
            {str(ref): value for ref, value in getattr(facts, name).items()}
            for facts in (left, right)
        ]
        yield from _map_faults(name, *both)
    yield from _map_faults("blocks.next", dict(left.blocks.next), dict(right.blocks.next))
    yield from _map_faults("blocks.member", dict(left.blocks.member), dict(right.blocks.member))
    both = [
        {b.exit: (b.entry, set(b.nodes)) for b in facts.blocks.blocks.values()}
        for facts in (left, right)
    ]
    yield from _map_faults("blocks", *both)
    if left.blocks.tail != right.blocks.tail:
        yield "blocks.tail", f"is {left.blocks.tail!r}, not {right.blocks.tail!r}"


def two_sizes(graph: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """Two values for every symbol within its range: distinct, one odd and one even where there is
    room.
    """
    pairs = {}
    for position, symbol in enumerate(graph.symbols):
        top = symbol.max if symbol.max is not None else max(symbol.min, 3) + 64
        low = min(max(symbol.min, 3) + 2 * position, top)
        pairs[symbol.name] = (low, min(low + 5 + 2 * position, top))
    return {name: pair[0] for name, pair in pairs.items()}, {
        name: pair[1] for name, pair in pairs.items()
    }


def _type_faults(facts: Facts, sizes: tuple[Mapping[str, int], ...]) -> Iterator[Fault]:
    graph = facts.graph
    if set(facts.types) != set(graph.nodes):
        yield (
            "types",
            f"are not those of the nodes: {sorted(set(facts.types) ^ set(graph.nodes))[:5]}",
        )
        return
    for point in sizes:
        at = f" at {dict(point)}" if point else ""
        try:
            values = run_fake(graph, point)
        except FakeRunError as error:
            yield f"types {error.id}", f"torch refuses the operands{at}: {error.reason}"
            continue
        for id in graph.nodes:
            if len(values[id]) != len(facts.types[id]):
                yield (
                    f"types {id}",
                    f"has {len(facts.types[id])} outputs, torch says {len(values[id])}{at}",
                )
                continue
            for idx, (type_, value) in enumerate(zip(facts.types[id], values[id], strict=True)):
                if fault := fault_of(type_, value, point):
                    yield f"types {id}:{idx}", fault + at


def _block_faults(facts: Facts, naive: "Naive") -> Iterator[Fault]:
    table, chain = facts.blocks, naive.chain()
    entries = [START, *chain[:-1]]
    yield from _map_faults(
        "blocks.next", dict(table.next), dict(zip(entries, chain, strict=True)) if chain else {}
    )
    yield from _map_faults("blocks.member", dict(table.member), naive.member)
    got = {exit_: (block.entry, block.exit, block.nodes) for exit_, block in table.blocks.items()}
    want = {
        exit_: (entry, exit_, tuple(sorted(naive.block_nodes[exit_], key=naive.graph.order_key)))
        for entry, exit_ in zip(entries, chain, strict=bool(chain))
    }
    yield from _map_faults("blocks", got, want)
    if table.tail != (chain[-1] if chain else ""):
        yield "blocks.tail", f"is {table.tail!r}, the last block is {chain[-1:]}"


def _region_faults(facts: Facts, naive: "Naive") -> Iterator[Fault]:
    graph = facts.graph
    homes = naive.chain()
    if naive.exits(CONTEXT):
        homes.append(CONTEXT)
    want = {
        home: build_region(graph, facts.type_of, naive.exits(home), partial(_is_at, naive, home))
        for home in homes
    }
    yield from _map_faults("regions", dict(facts.regions), want)
    for home, region in want.items():
        nodes = {id for id in naive.data | naive.context if naive.home(id) == home}
        if set(region.order) != nodes:
            yield (
                f"regions {home}",
                f"computes {sorted(region.order)}, its home has {sorted(nodes)}",
            )


def _is_at(naive: "Naive", home: str, id: str) -> bool:
    return naive.home(id) == home


def _map_faults(name: str, got: Mapping[str, Any], want: Mapping[str, Any]) -> Iterator[Fault]:
    for key in sorted(got.keys() | want.keys()):
        if key not in got:
            yield f"{name} {key}", f"is missing; it is {want[key]}"
        elif key not in want:
            yield f"{name} {key}", f"is {got[key]}; there should be none"
        elif got[key] != want[key]:
            yield f"{name} {key}", f"is {got[key]}, not {want[key]}"


def _raise(message: str, graph: Graph, faults: Iterator[Fault]) -> None:
    found = list(faults)
    if found:
        shown = found[:_FAULTS_SHOWN]
        if len(found) > len(shown):
            shown.append(("...", f"and {len(found) - len(shown)} more"))
        raise FactsError(
            f"{message}: {len(found)} differences", where=graph.name, detail=shown,
            remedy="this is a bug of graphopt; report it with the delta that led here",
        )  # fmt: skip
