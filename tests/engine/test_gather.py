"""In what order the artifacts of a plan come into memory, and what becomes of those that do not."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from graphopt.builder.records import DONE, Answer
from graphopt.engine.assembly import Keyed, Piece
from graphopt.engine.gather import Gathering, gather
from graphopt.executor.backend import Options

MIB = 1 << 20


class World:
    """A supply, a link and a model of which only this much exists; `said` is what was asked of them."""

    def __init__(
        self, on_disk: str = "", broken: str = "", fails: str = "", is_timid: bool = True
    ) -> None:
        self.said: list[str] = []
        self.is_timid = is_timid  # nothing is loaded before it is proven
        self.on_disk, self.broken, self.fails = on_disk, broken, fails
        self.there: set[str] = set()
        self.name, self.revision = "m", 3
        self.settings = SimpleNamespace(events=lambda *_: None)
        self.loaded = SimpleNamespace(find=lambda key: key[1] if key[1] in self.there else None)

    def is_at_hand(self, key: Any) -> bool:
        return key[1] in self.on_disk or key[1] in self.there

    def fetch(self, facts: object, piece: Piece, key: Any) -> bool:
        self.said.append(f"fetch {key[1]}")
        if key[1] in self.broken:
            return False
        self.there.add(key[1])
        return True

    def held_bytes(self, key: Any) -> int:
        return MIB

    def job(self, model: str, revision: int, piece: Piece) -> Any:
        return SimpleNamespace(piece=piece, revision=revision)

    def build(self, job: Any, ran: "Future[bool]") -> "Future[Answer]":
        self.said.append(f"build {job.piece.blocks[0]}")
        return Future()

    def load_early(self, facts: object, piece: Piece, job: Any) -> Any:
        if self.is_timid:
            return None
        self.said.append(f"load {piece.blocks[0]}")
        return SimpleNamespace(function=f"of {piece.blocks[0]}")

    def take(
        self, facts: object, piece: Piece, key: Any, job: Any, answer: Answer, early: Any
    ) -> str:
        if early is not None:
            self.said.append(f"take {piece.blocks[0]}")
        self.there.add(key[1])
        return ""

    def run(self, keyed: Keyed, into: Gathering) -> "list[Future[Answer]]":
        """Gathers, and answers each job when it is waited for; the futures waited for."""
        waited: list[Future[Answer]] = []
        meanwhile = lambda missing: self.said.append(f"meanwhile {len(missing)}")  # noqa: E731
        course = gather(self, None, self, self, keyed, into, meanwhile)  # type: ignore[arg-type]
        answer: Any = None
        try:
            while True:
                future = course.send(answer)
                if future not in into.asked:  # whether it has run
                    answer = not self.fails
                    continue
                waited.append(future)
                is_bad = waited[-1] in self.bad_ones(into)
                answer = Answer(not is_bad, "build" if is_bad else DONE, "bad" if is_bad else "")
        except StopIteration:
            return waited

    def bad_ones(self, into: Gathering) -> "list[Future[Answer]]":
        return into.asked if self.fails else []


def keyed(names: str, structures: str = "") -> Keyed:
    """An artifact for each letter; those of one structure are twins."""
    return [
        (Piece((name,), "b", Options()), (structure, name, "b", "1", "{}"))
        for name, structure in zip(names, structures or names, strict=True)
    ]


def test_the_builder_is_asked_before_what_lies_on_disk_is_loaded() -> None:
    world, into = World(on_disk="ac"), Gathering()
    world.run(keyed("abc"), into)
    assert world.said == ["build b", "meanwhile 1", "fetch a", "fetch c"]
    assert into.is_decided
    assert {key[1] for key in into.loaded} == {"a", "b", "c"}
    assert into.resident_bytes == 3 * MIB


def test_with_everything_at_hand_nobody_is_asked() -> None:
    world, into = World(on_disk="ab"), Gathering()
    assert world.run(keyed("ab"), into) == []
    assert world.said == ["fetch a", "fetch b"]
    assert into.build_s is None


def test_what_does_not_load_is_built_after_all() -> None:
    world, into = World(on_disk="ab", broken="a"), Gathering()
    world.run(keyed("abc"), into)
    assert world.said == ["build c", "meanwhile 1", "fetch a", "fetch b", "build a"]
    assert {key[1] for key in into.loaded} == {"a", "b", "c"}


def test_twins_wait_for_the_first_of_their_structure_and_are_not_asked_for_where_it_fails() -> None:
    world = World()
    world.run(keyed("abc", "xxy"), Gathering())
    assert world.said == ["build a", "build c", "meanwhile 3", "build b"]
    failing, into = World(fails="all"), Gathering()
    failing.run(keyed("abc", "xxy"), into)
    assert failing.said == ["build a", "build c", "meanwhile 3"]
    assert into.reasons == ["b of a (1 thread): build: bad", "b of c (1 thread): build: bad"]


def test_what_is_too_large_ends_it_and_takes_back_what_was_asked() -> None:
    world, into = World(on_disk="ab"), Gathering(bytes_max=MIB)
    assert world.run(keyed("abc"), into) == []
    assert world.said == ["build c", "meanwhile 1", "fetch a", "fetch b"]
    assert into.is_too_large
    assert [future.cancelled() for future in into.asked] == [True]


def test_what_is_too_large_once_built_ends_it_before_the_twins() -> None:
    world, into = World(), Gathering(bytes_max=0)
    world.run(keyed("ab", "xx"), into)
    assert world.said == ["build a", "meanwhile 2"]
    assert into.is_too_large


def test_what_has_run_in_the_builder_is_loaded_while_it_is_proven() -> None:
    world, into = World(is_timid=False), Gathering()
    world.run(keyed("ab"), into)
    said = ["load a", "take a", "load b", "take b"]
    assert world.said == ["build a", "build b", "meanwhile 2", *said]


def test_what_does_not_run_in_the_builder_is_never_loaded() -> None:
    world, into = World(fails="a", is_timid=False), Gathering()
    world.run(keyed("a"), into)
    assert world.said == ["build a", "meanwhile 1"]
    assert not world.there
