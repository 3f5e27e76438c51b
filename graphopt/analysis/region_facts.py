"""The last queries of an update: the regions of blocks, who reads what, and who reads it last.

A block's region is built anew where its nodes, their types or what others read of it changed. Readers
are counted per value from outside, so that a value can be let go after the last of them.
"""

import immutables

from graphopt.analysis.blocks import CONTEXT, END, BlockTable, BlockUpdate
from graphopt.analysis.fact_table import Facts, Trace, Update
from graphopt.analysis.propagate import user_nodes
from graphopt.analysis.regions import Region, build_region
from graphopt.draft import OUTPUT_PREFIX, Change
from graphopt.graph import Graph, Ref

_NONE: "immutables.Map[str, int]" = immutables.Map()


class RegionUpdate:
    """One update of regions and readers, after everything about single nodes is known.

    `moved` are the nodes that became data or context, live or not; `trace` has the queries so far.
    """

    def __init__(
        self,
        old: Facts,
        graph: Graph,
        change: Change,
        moved: set[str],
        retyped_consts: set[str],
        trace: Trace,
    ) -> None:
        self.old, self.graph, self.change = old, graph, change
        self.moved, self.retyped_consts, self.trace = moved, retyped_consts, trace

    def run(
        self, facts: Facts, blocks: BlockUpdate, retyped: set[str], rehomed: set[str]
    ) -> Update:
        """The whole update. `facts` has everything but regions and readers, which are still the old ones."""
        graph, old = self.graph, self.old
        stale = set(blocks.fresh | blocks.gone) | self._other_outputs_read(facts)
        nodes = set(self.change.nodes | self.change.removed | retyped | rehomed)
        for id in retyped:
            nodes.update(user_nodes(graph, id))
        for name in self.change.inputs:
            nodes.update(user_nodes(graph, name))
        for name in self.retyped_consts:
            nodes.update(graph.const_users.get(name, _NONE))
        for id in nodes:
            stale.update(home for home in (old.home_of(id), facts.home_of(id)) if home)
        if self.change.outputs:
            for source in (old, facts):
                stale.update(
                    home for _, ref in source.graph.outputs if (home := source.home_of(ref.id))
                )
        regions, readers = old.regions.mutate(), old.readers.mutate()
        taps = _taps(facts)
        recounted: set[Ref] = set()
        changed: set[str] = set()
        gone: set[str] = set()
        for exit_ in sorted(stale - {CONTEXT}):
            region = (
                self._block_region(facts, exit_, taps) if exit_ in facts.blocks.blocks else None
            )
            self._replace(facts.blocks, regions, readers, exit_, region, recounted, changed, gone)
        for exit_ in (
            blocks.fresh | blocks.moved
        ):  # they may read what they read before, and in another order
            recounted.update(self._foreign(regions.get(exit_), facts.blocks))
        counted = readers.finish()
        readers = counted.mutate()
        context = self._context_region(facts, counted, taps)
        if context != old.regions.get(CONTEXT):
            self._replace(
                facts.blocks, regions, readers, CONTEXT, context, recounted, changed, gone
            )
        counted = readers.finish()
        last, released = self._last_readers(facts, counted, recounted)
        done = Facts(
            graph,
            facts.types,
            facts.traits,
            facts.live,
            facts.blocks,
            facts.homes,
            regions.finish(),
            counted,
            last,
        )
        weights = {
            home for name in self.change.constants for user in graph.const_users.get(name, _NONE)
            if (home := done.home_of(user))
        }  # fmt: skip
        if self.change.outputs:
            released |= self._output_readers(done)
        return Update(
            done, self.trace.reran, frozenset(changed), frozenset(gone), frozenset(weights - changed),
            frozenset(b for b in released - changed - weights if b in done.regions), blocks.moved,
            self.change.used,
        )  # fmt: skip

    def _other_outputs_read(self, facts: Facts) -> set[str]:
        """The blocks whose exit has several outputs, and another one of them may be read now."""
        found: set[str] = set()
        for source in (self.old, facts):
            nodes = source.graph.nodes
            for id in self.change.nodes | self.change.removed | self.moved:
                refs = nodes[id].refs if id in nodes else ()
                found.update(
                    ref.id for ref in refs if ref.id in nodes and nodes[ref.id].spec.returns != 1
                )
        return {id for id in found if id in facts.blocks.blocks}

    def _output_readers(self, facts: Facts) -> set[str]:
        """The blocks that read a value that is, or was, an output: they may let go of it, or may no
        longer.
        """
        refs = {ref for _, ref in (*self.old.graph.outputs, *self.graph.outputs)}
        found = {exit_ for ref in refs for exit_ in facts.readers.get(ref, ())}
        return found | {
            exit_ for ref in refs if (exit_ := facts.blocks.next.get(ref.id)) is not None
        }

    def _block_region(self, facts: Facts, exit_: str, taps: dict[str, list[Ref]]) -> Region:
        block = facts.blocks.blocks[exit_]
        exits: dict[Ref, None] = {}
        if exit_ != END:
            users = self.graph.users.get(exit_, _NONE)
            read = {
                ref for user in users if not user.startswith(OUTPUT_PREFIX)
                for ref in self.graph.nodes[user].refs
                if ref.id == exit_ and (facts.blocks.member.get(user) not in (None, exit_))
            }  # fmt: skip
            exits |= dict.fromkeys(sorted(read, key=lambda r: r.idx))
        exits |= dict.fromkeys(taps.get(exit_, ()))
        self.trace("region", exit_)
        return build_region(
            self.graph, facts.type_of, tuple(exits), lambda id: facts.home_of(id) == block.exit
        )

    def _context_region(
        self,
        facts: Facts,
        readers: "immutables.Map[Ref, immutables.Map[str, int]]",
        taps: dict[str, list[Ref]],
    ) -> Region | None:
        wanted = {ref for ref in readers if facts.homes.get(ref.id) == CONTEXT} | set(
            taps.get(CONTEXT, ())
        )
        if not wanted:
            return None
        exits = tuple(sorted(wanted, key=lambda r: (r.id, r.idx)))
        previous = facts.regions.get(CONTEXT)
        touched = (
            self.change.nodes
            | self.change.removed
            | self.change.inputs
            | set(self.trace.reran.get("home", ()))
        )
        inside = set(previous.order) if previous else set()
        is_same = (
            previous is not None
            and previous.exits == exits
            and not (inside & touched)
            and not self._types_moved(previous)
        )
        if is_same:
            return previous
        self.trace("region", CONTEXT)
        return build_region(
            self.graph, facts.type_of, exits, lambda id: facts.homes.get(id) == CONTEXT
        )

    def _types_moved(self, region: Region) -> bool:
        reran = set(self.trace.reran.get("type", ()))
        return any(id in reran for id in region.order) or bool(
            set(region.consts) & self.retyped_consts
        )

    @staticmethod
    def _foreign(region: Region | None, blocks: BlockTable) -> list[Ref]:
        """What `region` reads besides the cut before it, which nobody else can read."""
        return [ref for ref in region.reads if ref.id not in blocks.member] if region else []

    def _replace(
        self,
        blocks: BlockTable,
        regions: "immutables.MapMutation[str, Region]",
        readers: "immutables.MapMutation[Ref, immutables.Map[str, int]]",
        exit_: str,
        region: Region | None,
        recounted: set[Ref],
        changed: set[str],
        gone: set[str],
    ) -> None:
        previous = regions.get(exit_)
        if previous == region:
            return
        for ref in self._foreign(previous, self.old.blocks):
            counts = readers[ref].delete(exit_)
            if counts:
                readers[ref] = counts
            else:
                del readers[ref]
            recounted.add(ref)
        if region is None:
            del regions[exit_]
            gone.add(exit_)
            return
        regions[exit_] = region
        changed.add(exit_)
        for ref in self._foreign(region, blocks):
            readers[ref] = readers.get(ref, _NONE).set(exit_, 1)
            recounted.add(ref)

    def _last_readers(
        self,
        facts: Facts,
        readers: "immutables.Map[Ref, immutables.Map[str, int]]",
        recounted: set[Ref],
    ) -> tuple["immutables.Map[Ref, str]", set[str]]:
        last = self.old.last_readers.mutate()
        moved: set[str] = set()
        blocks, key = facts.blocks.blocks, self.graph.order_key

        def position(exit_: str) -> tuple[int, str]:
            return key(blocks[exit_].nodes[0]) if exit_ in blocks else (-1, "")

        for ref in sorted(recounted, key=lambda r: (r.id, r.idx)):
            before = last.pop(ref, None)
            after = None
            if ref in readers:
                self.trace("reader", str(ref))
                after = last[ref] = max(readers[ref], key=position)
            if before != after:
                moved.update(block for block in (before, after) if block is not None)
        return last.finish(), moved


def _taps(facts: Facts) -> dict[str, list[Ref]]:
    """The outputs each block hands out, in the order of the graph's outputs."""
    found: dict[str, list[Ref]] = {}
    for _, ref in facts.graph.outputs:
        home = facts.home_of(ref.id)
        if home is not None:
            found.setdefault(home, []).append(ref)
    return found
