"""Node ids from module paths, which people read in deltas, logs and `explain`.

A module without children that runs one op gives that op its path
(`encoder.layer.3.attention.self.query`). Other ops are called `path/op`, then `path/op_1`, in
execution order (`encoder.layer.3/add`); ops of the root module are plain `op`, `op_1`. A module's
second call is `path@1`. Sizes read from inputs are `sym_size/batch`. Ids depend only on the module
tree and the order of execution, so they do not move between imports: not on torch's node names, nor
on the wrappers that torch and others put around modules.

Why a lone op of a module *with* children is not called by the path: `encoder.layer.3` must stay
free to mean the whole prefix.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

_ILLEGAL = re.compile(r"[\s$,()\[\]{}'\"=]+")
_SUBSCRIPT = re.compile(r"\.?_modules\[['\"]?([^'\"\]]*)['\"]?\]|\[['\"]([^'\"\]]*)['\"]\]")
_CALL = re.compile(r"@(\d+)\Z")
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's stack of nodes it inserted itself


@dataclass(frozen=True, slots=True)
class Place:
    """Where an op was run: the path of the module and which of its calls.

    `is_shape` marks arithmetic on sizes.
    """

    path: str
    call: int
    op: str
    is_shape: bool = False
    symbol: str = ""  # for a size read from an input: the symbol it is

    @property
    def module(self) -> str:
        """The path with the call: `encoder.shared@1`."""
        return f"{self.path}@{self.call}" if self.call else self.path


def clean_path(path: str) -> str:
    """A module path as a person writes it: dotted, without wrappers and illegal characters."""
    path = _SUBSCRIPT.sub(lambda match: "." + (match[1] or match[2] or ""), path)
    path = path.removeprefix("L__self__").removeprefix("self.")
    parts = [_ILLEGAL.sub("_", part.strip()) for part in path.split(".")]
    return ".".join(part for part in parts if part and part not in _WRAPPERS)


def module_place(stack: Sequence[tuple[str, str]]) -> tuple[str, int]:
    """Path and call of the innermost module of an `nn_module_stack`, given as (key, path) pairs."""
    if not stack or stack[-1][0] == NO_MODULE:
        return "", 0
    key, path = stack[-1]
    match = _CALL.search(key) or _CALL.search(path)
    return clean_path(_CALL.sub("", path)), int(match[1]) if match else 0


def op_name(op: str) -> str:
    """The short name of an op: `aten._to_copy.default` is `to_copy`, `sym.add` is `sym_add`."""
    parts = op.split(".")
    if parts[0] == "sym":
        return f"sym_{parts[1]}"
    return parts[1].strip("_") or parts[1]


def assign_ids(places: Sequence[Place], taken: Iterable[str]) -> list[str]:
    """One id for each op, in order, different from each other and from `taken` (the inputs)."""
    paths = {place.path for place in places if place.path}
    parents = {prefix for path in paths for prefix in _prefixes(path)}
    own = Counter(place.module for place in places if not place.is_shape)
    used = set(taken)
    counts: Counter[str] = Counter()
    ids: list[str] = []
    for place in places:
        wanted = _wanted(place, own, parents)
        id = f"{wanted}_{counts[wanted]}" if counts[wanted] else wanted
        while id in used:
            counts[wanted] += 1
            id = f"{wanted}_{counts[wanted]}"
        counts[wanted] += 1
        used.add(id)
        ids.append(id)
    return ids


def unique_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted` without illegal characters, numbered when `taken` has it."""
    name = _ILLEGAL.sub("_", wanted).lstrip("@") or "_"
    number = 0
    while (f"{name}_{number}" if number else name) in taken:
        number += 1
    return f"{name}_{number}" if number else name


def _wanted(place: Place, own: Counter[str], parents: set[str]) -> str:
    name = op_name(place.op)
    if place.symbol:
        return f"{name}/{place.symbol}"
    if not place.path:
        return name
    if not place.is_shape and own[place.module] == 1 and place.path not in parents:
        return place.module
    return f"{place.module}/{name}"


def _prefixes(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))
