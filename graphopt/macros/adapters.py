"""Attaching and detaching LoRA adapters.

An adapter goes live unfolded: for a layer y = x W' + b it adds, under ids that name layer and
adapter,

    LAYER/adapter.NAME.a   = x A'            [.., r]
    LAYER/adapter.NAME.b   = a B'            [.., out]
    LAYER/adapter.NAME.out = y + scale * b

and the layer's users read `out`. A second adapter stacks on the first; `out` of either can be taken
away again, so adapters come and go in any order, and what is left is the graph as if the detached
one had never been there. Base constants are never altered: saved modules and biases come as
constants of their own, `adapters/NAME/saved/ORIGINAL`, and detaching points the layer back at
ORIGINAL.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from graphopt.adapters.peft import adapter_files, read_adapter
from graphopt.adapters.resolve import LinearSite, LoraPair
from graphopt.constants import constant_of
from graphopt.delta import (
    AddNode,
    DropConstant,
    Primitive,
    PutConstant,
    RemoveNode,
    Rewire,
    SetAttr,
)
from graphopt.draft import Draft
from graphopt.errors import AdapterError, nearest
from graphopt.graph import Arg, Const, Node, Ref
from graphopt.safe_file import Source

PREFIX = "adapters/"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, init=False)
class AttachAdapter:
    """A PEFT LoRA folder, attached under `name`; `scale` multiplies the adapter's own scaling."""

    name: str
    files: Mapping[str, Source]
    scale: float
    label: str

    def __init__(
        self,
        name: str,
        folder: "str | os.PathLike[str] | Mapping[str, Source]",
        scale: float = 1.0,
        label: str = "",
    ) -> None:
        files = folder if isinstance(folder, Mapping) else adapter_files(folder)
        shown = label or (name if isinstance(folder, Mapping) else os.fspath(folder))
        for attribute, value in (
            ("name", name),
            ("files", files),
            ("scale", scale),
            ("label", shown),
        ):
            object.__setattr__(self, attribute, value)

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """Three nodes and two constants for each adapted layer, and one constant for each saved
        tensor.
        """
        if not _NAME.fullmatch(self.name):
            raise AdapterError(
                f"{self.name!r} is no adapter name",
                where="name",
                remedy="use letters, digits, _ and -",
            )
        if self.name in attached(draft):
            raise AdapterError(
                f"an adapter {self.name!r} is attached already",
                where=self.name,
                remedy="detach it first",
            )
        layers = _layers(draft)
        sites = {module: site for module, (site, _) in layers.items()}
        names = draft.known_constants()
        constants = {
            n: draft.constants[draft.aliases.get(n, n)].tensor
            for n in names
            if not n.startswith(PREFIX)
        }
        resolved = read_adapter(self.files, label=self.label).resolve(sites, constants)
        for original, tensor in sorted(resolved.replaced.items()):
            yield from self._save(draft, original, tensor)
        for pair in resolved.pairs:
            site, nodes = layers[pair.module]
            yield from self._constants(pair)
            for node in nodes:
                yield from self._branch(draft, node, site, pair)

    def _save(self, draft: Draft, original: str, tensor: object) -> Iterator[Primitive]:
        canonical = draft.aliases.get(original, original)
        saved = f"{PREFIX}{self.name}/saved/{canonical}"
        users = sorted(draft.const_users.get(canonical, ()))
        if not users:
            raise AdapterError(
                f"{original} is replaced by another adapter already",
                where=original,
                remedy="detach that adapter first",
            )
        yield PutConstant(saved, tensor, is_param=True)  # type: ignore[arg-type]
        for user in users:
            for parameter in _parameters_reading(draft, draft.get_node(user), canonical):
                yield SetAttr(user, parameter, Const(saved))

    def _constants(self, pair: LoraPair) -> Iterator[Primitive]:
        a, b = pair.a, pair.b
        if pair.kind == "embedding":
            a = a.t().contiguous()  # rows are looked up
        yield PutConstant(
            f"{PREFIX}{self.name}/{pair.module}.lora_A", constant_of(a), is_param=True
        )
        yield PutConstant(
            f"{PREFIX}{self.name}/{pair.module}.lora_B", constant_of(b), is_param=True
        )

    def _branch(
        self, draft: Draft, node: Node, site: LinearSite, pair: LoraPair
    ) -> Iterator[Primitive]:
        stem = f"{node.id}/adapter.{self.name}"
        a, b = (
            Const(f"{PREFIX}{self.name}/{pair.module}.lora_A"),
            Const(f"{PREFIX}{self.name}/{pair.module}.lora_B"),
        )
        bound = node.bound()
        match site.kind:
            case "linear":
                yield AddNode(f"{stem}.a", "aten.linear.default", (bound["input"], a))
                yield AddNode(f"{stem}.b", "aten.linear.default", (Ref(f"{stem}.a"), b))
            case "conv1d_transposed":
                yield AddNode(f"{stem}.a", "aten.linear.default", (bound["mat1"], a))
                yield AddNode(f"{stem}.b", "aten.linear.default", (Ref(f"{stem}.a"), b))
            case "embedding":
                yield AddNode(f"{stem}.a", "aten.embedding.default", (a, bound["indices"]))
                yield AddNode(f"{stem}.b", "aten.linear.default", (Ref(f"{stem}.a"), b))
            case "conv2d":
                geometry = (bound["stride"], bound["padding"], bound["dilation"])
                yield AddNode(
                    f"{stem}.a", "aten.conv2d.default", (bound["input"], a, None, *geometry)
                )
                yield AddNode(f"{stem}.b", "aten.conv2d.default", (Ref(f"{stem}.a"), b))
        top = _top(draft, node.id)
        users = tuple(sorted(draft.users.get(top, ())))
        scale = float(pair.scale * self.scale)
        yield AddNode(
            f"{stem}.out", "aten.add.Tensor", (Ref(top), Ref(f"{stem}.b")), (("alpha", scale),)
        )
        if users:
            yield Rewire(Ref(top), Ref(f"{stem}.out"), users)


@dataclass(frozen=True, slots=True)
class DetachAdapter:
    """The adapter `name` goes, with its nodes and constants; the base is exactly what it was."""

    name: str

    def expand(self, draft: Draft) -> Iterator[Primitive]:
        """Bridges each `out`, removes the branch, points saved constants back."""
        if self.name not in (known := attached(draft)):
            remedy = (
                nearest(self.name, known) or f"attached are {', '.join(sorted(known)) or 'none'}"
            )
            raise AdapterError(
                f"no adapter {self.name!r} is attached", where=self.name, remedy=remedy
            )
        prefix = f"{PREFIX}{self.name}/"
        own = [name for name in draft.known_constants() if name.startswith(prefix)]
        for name in own:
            users = sorted(draft.const_users.get(name, ()))
            if name.startswith(prefix + "saved/"):
                original = name.removeprefix(prefix + "saved/")
                for user in users:
                    for parameter in _parameters_reading(draft, draft.get_node(user), name):
                        yield SetAttr(user, parameter, Const(original))
            elif name.endswith(".lora_A"):
                for user in users:
                    yield from _unbranch(draft, user.removesuffix(".a"))
        for name in own:
            yield DropConstant(name)


def attached(draft: Draft) -> set[str]:
    """The names of the adapters attached to the graph."""
    return {
        name.removeprefix(PREFIX).split("/")[0]
        for name in draft.known_constants()
        if name.startswith(PREFIX)
    }


def _unbranch(draft: Draft, stem: str) -> Iterator[Primitive]:
    out = draft.get_node(f"{stem}.out")
    users = tuple(sorted(draft.users.get(out.id, ())))
    if users:
        yield Rewire(Ref(out.id), out.args[0], users)
    for part in ("out", "b", "a"):
        yield RemoveNode(f"{stem}.{part}")


def _top(draft: Draft, id: str) -> str:
    """The node that stands for layer `id` to its users: itself, or the `out` of the adapter stacked
    last.
    """
    prefix = f"{id}/adapter."
    top = id
    while True:
        above = [u for u in draft.users.get(top, ()) if u.startswith(prefix) and u.endswith(".out")]
        above = [u for u in above if draft.get_node(u).args[0] == Ref(top)]
        if not above:
            return top
        top = above[0]


def _layers(draft: Draft) -> dict[str, tuple[LinearSite, list[Node]]]:
    """Every layer an adapter could be attached to, by module path, with the nodes that apply it."""
    named: dict[str, list[str]] = {}
    for alias in draft.known_constants():
        named.setdefault(draft.aliases.get(alias, alias), []).append(alias)
    found: dict[str, tuple[LinearSite, list[Node]]] = {}
    for id in draft.known_values():
        node: Node | None = draft.nodes.get(id)
        if node is None or "/adapter." in id or node.op not in _WEIGHT_OF:
            continue
        kind, parameter = _WEIGHT_OF[node.op]
        bound = node.bound()
        weight: Arg = bound[parameter]
        if not isinstance(weight, Const) or (kind == "conv2d" and bound["groups"] != 1):
            continue
        site = _site(draft, node, kind, weight.name, named)
        if site is not None:
            found.setdefault(site.module, (site, []))[1].append(node)
    return found


_WEIGHT_OF = {
    "aten.linear.default": ("linear", "weight"),
    "aten.addmm.default": ("conv1d_transposed", "mat2"),
    "aten.embedding.default": ("embedding", "weight"),
    "aten.conv2d.default": ("conv2d", "weight"),
}


def _site(
    draft: Draft, node: Node, kind: str, weight: str, named: Mapping[str, list[str]]
) -> LinearSite | None:
    canonical = draft.aliases.get(weight, weight)
    shape = draft.constants[canonical].type.shape
    if len(shape) != (4 if kind == "conv2d" else 2):
        return None
    bare = [re.sub(rf"^{PREFIX}[^/]+/saved/", "", name) for name in named[canonical]]
    own = node.id.split("@")[0]
    # A tied weight has several names; the one that is this node's module is meant.
    name = next((n for n in bare if n.rpartition(".")[0] == own), bare[0])
    module = name.rpartition(".")[0] or name
    bias = node.bound().get("bias" if node.op != "aten.addmm.default" else "self")
    out_first = kind in ("linear", "conv2d")
    sizes = (shape[1], shape[0]) if out_first else (shape[0], shape[1])
    bias_name = (
        re.sub(rf"^{PREFIX}[^/]+/saved/", "", bias.name) if isinstance(bias, Const) else None
    )
    return LinearSite(module, name, bias_name, sizes[0], sizes[1], kind, tuple(shape[2:]))  # type: ignore[arg-type]


def _parameters_reading(draft: Draft, node: Node, name: str) -> list[str]:
    """The parameters of `node` whose argument is the constant `name`, under any of its names."""
    return [
        parameter for parameter, arg in node.bound().items()
        if isinstance(arg, Const) and draft.aliases.get(arg.name, arg.name) == name
    ]  # fmt: skip
