"""Plain modules: every trap of torch.export that was met, handled or refused by name."""

import collections

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.testing import assert_close

from frontend.interpret import run
from graphopt.errors import ImportRefusedError
from graphopt.frontend.torch_export import from_program, from_torch
from graphopt.graph import Symbol
from graphopt.signature import signature_of


def call(graph, *args, **kwargs):
    signature = signature_of(graph)
    return signature.rebuild(run(graph, signature.bind(args, kwargs)))


def leaves(value):
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [value]


def check(module, examples, shapes="batch", sizes=(1, 2, 5)):
    """Imports the module and compares at several sizes of dim 0; returns the graph."""
    graph = from_torch(module, examples, shapes)
    module.eval()
    for size in sizes:
        inputs = [torch.randn(size, *x.shape[1:]) for x in examples]
        with torch.no_grad():
            expected = module(*inputs)
        answer = call(graph, *inputs)
        for got, wanted in zip(leaves(answer), leaves(expected), strict=True):
            # Eager takes a fused path for whole layers here; the graph has its ops one by one.
            assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    return graph


class Calls(nn.Module):
    """A module called twice, another under two names, no_grad, a tensor in the code, a nested answer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5))
        self.shared = self.block

    def forward(self, x):
        with torch.no_grad():
            y = self.lin(x)
        y = self.lin(y) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        y = self.shared(self.block(y))
        return {"hidden": y, "all": (y * 2, [y + x.shape[0]], None)}


def test_repeated_calls_shared_modules_and_lifted_tensors_get_names():
    graph = from_torch(Calls(), torch.randn(1, 4), "batch")
    assert set(graph.nodes) == {
        *("sym_size/batch", "lin", "lin@1", "add", "block.0", "block.1", "shared.0", "shared.1"),
        *("mul", "add_1"),
    }
    assert set(graph.constants) == {
        "lin.weight", "lin.bias", "block.0.weight", "block.0.bias", "lifted_tensor_0"
    }  # fmt: skip
    assert dict(graph.aliases) == {
        "shared.0.weight": "block.0.weight",
        "shared.0.bias": "block.0.bias",
    }


def test_the_answers_structure_is_kept():
    module = Calls().eval()
    graph = from_torch(module, torch.randn(2, 4), "batch")
    assert [name for name, _ in graph.outputs] == ["hidden", "all.0", "all.1.0"]
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = module(x)
    answer = call(graph, x)
    assert torch.equal(answer.hidden, expected["hidden"])
    assert torch.equal(answer["all"][1][0], expected["all"][1][0])


def test_dims_are_static_unless_asked_for():
    graph = from_torch(nn.Linear(4, 2), torch.randn(1, 4))
    assert graph.symbols == ()
    assert str(graph.input_type("input")) == "f32[1, 4]"


def test_mlp_and_conv_net():
    check(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(1, 4),))
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Dropout2d(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    graph = check(net, (torch.randn(1, 3, 8, 8),))
    assert graph.nodes["1"].op == "aten.batch_norm.default"
    assert "3" not in graph.nodes


def test_attention_called_with_one_tensor_thrice_still_has_three_inputs():
    x = torch.randn(1, 5, 8)
    graph = check(nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x))
    assert [name for name, _ in graph.inputs] == ["query", "key", "value"]


def test_transformer_encoder_is_imported_op_by_op():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    graph = check(nn.TransformerEncoder(layer, 1), (torch.randn(1, 5, 8),))
    assert "layers.0.linear1" in graph.nodes


def test_recurrent_networks_are_one_op():
    lstm = check(nn.LSTM(4, 6, batch_first=True), (torch.randn(1, 5, 4),))
    gru = check(nn.GRU(4, 6, batch_first=True), (torch.randn(1, 5, 4),))
    assert "aten.lstm.input" in {node.op for node in lstm.iter_nodes()}
    assert "aten.gru.input" in {node.op for node in gru.iter_nodes()}
    assert [name for name, _ in lstm.outputs] == ["output_0", "output_1.0", "output_1.1"]


class Parts(nn.Module):
    """Ops with several results, a write into a fresh tensor, shape arithmetic, whole-number indexing."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        top = torch.topk(x, 2)
        y = x * 2
        y[:, 0] = 0
        y.relu_()
        rows = torch.arange(x.shape[0])
        merged = torch.cat([x, x]).reshape(x.shape[0] * 2, -1) * (x.shape[0] ** 2 % 3 + 1)
        return a * b, top.values, top.indices, y, x[rows, 0], None, merged[:, 1:]


def test_many_results_fresh_writes_and_shape_arithmetic():
    graph = check(Parts(), (torch.randn(1, 4),))
    ops = {node.op for node in graph.iter_nodes()}
    assert {"sym.mul", "sym.mod", "sym.add", "aten._unsafe_index.Tensor"} <= ops
    assert [name for name, _ in graph.outputs][-2:] == ["output_4", "output_6"]


class Keyword(nn.Module):
    """Arguments of every kind."""

    def forward(self, x, pair, *, scale=None, flag=False):
        y = x + pair[0] * pair[1]["deep"]
        return y if scale is None else y * scale


def test_nested_and_keyword_inputs_are_named_after_their_parameters():
    x = torch.randn(2, 4)
    examples = {"x": x, "pair": (x, {"deep": x}), "scale": x}
    graph = from_torch(Keyword(), examples, "batch")
    assert [name for name, _ in graph.inputs] == ["x", "pair.0", "pair.1.deep", "scale"]
    y = torch.randn(1, 4)
    assert torch.equal(call(graph, y, (y, {"deep": y}), scale=y), (y + y * y) * y)


def test_variadic_inputs_are_numbered_and_python_arguments_are_fixed():
    class Variadic(nn.Module):
        def forward(self, *xs):
            return xs[0] - xs[1]

    class Options(nn.Module):
        def forward(self, x, times=2, flip=False):
            return -x * times if flip else x * times

    x = torch.randn(1, 4)
    graph = check(Variadic(), (x, x))
    assert [name for name, _ in graph.inputs] == ["xs_0", "xs_1"]
    graph = from_torch(Options(), (x, 3, True), "batch")
    assert [name for name, _ in graph.inputs] == ["x"]
    assert torch.equal(call(graph, x), -x * 3)


def test_torchs_own_hints_give_dims_named_by_position():
    x, ids = torch.randn(4, 6), torch.ones(4, 3, dtype=torch.long)
    hints = {"x": {0: Dim.AUTO, 1: Dim.DYNAMIC}, "pair": ({0: Dim.AUTO, 1: Dim.DYNAMIC},)}

    class Two(nn.Module):
        def forward(self, x, pair):
            return x * 2, pair[0] * 2

    graph = from_torch(Two(), (x, (ids,)), hints)
    assert [str(type_) for _, type_ in graph.inputs] == ["f32[batch, x_1]", "i64[batch_1, seq]"]
    assert {symbol.min for symbol in graph.symbols} == {1}


def test_named_tuples_and_single_tuples_are_told_apart():
    pair = collections.namedtuple("Pair", "mean scale")

    class Record(nn.Module):
        def forward(self, x):
            return pair(x + 1, x * 2)

    class Lone(nn.Module):
        def forward(self, x):
            return (x + 1,)

    x = torch.ones(1)
    assert call(from_torch(Record(), x), x).scale.item() == 2
    assert call(from_torch(Lone(), x), x)[0].item() == 2
    assert [n for n, _ in from_torch(nn.ReLU(), x).outputs] == ["output"]


def test_an_input_or_a_constant_may_be_the_answer():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x, self.weight

    x = torch.zeros(2)
    answer = call(from_torch(Through(), x), x)
    assert answer[0] is x
    assert answer[1].tolist() == [1, 1]


def test_strange_module_and_dim_names_become_legal():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"a b": nn.Linear(4, 2), "c$(d)": nn.Linear(4, 2)})

        def forward(self, x):
            return self.heads["a b"](x) + self.heads["c$(d)"](x)

    graph = check(Heads(), (torch.randn(1, 4),))
    assert {"heads.a_b", "heads.c_d_"} <= set(graph.nodes)
    assert "heads.a_b.weight" in graph.constants


def test_bounds_given_are_kept_and_open_ones_are_narrowed():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(16, 4), persistent=False)

        def forward(self, x):
            return x + self.table[: x.shape[1]]

    x = torch.randn(1, 3, 4)
    opened = from_torch(Table(), (x,), {"x": {0: "batch", 1: "seq"}})
    assert opened.symbols == (Symbol("batch", 1, None), Symbol("seq", 1, 16))
    assert "table" in opened.constants
    assert not opened.constants["table"].is_param
    bounded = from_torch(Table(), (x,), ({1: Dim("steps", min=2, max=8)},))
    assert bounded.symbols == (Symbol("steps", 2, 8),)
    with pytest.raises(ImportRefusedError, match="does not accept these dynamic dims"):
        from_torch(Table(), (x,), ({1: Dim("steps", max=99)},))


def test_the_module_is_left_as_it_was_and_the_graph_does_not_follow_it():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    module[1].eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    graph = from_torch(module, torch.randn(1, 2), "batch")
    assert [part.training for part in module.modules()] == [True, True, False, False, False]
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    before = graph.constants["0.weight"].tensor.clone()
    with torch.no_grad():
        module[0].weight.add_(1)
    assert torch.equal(graph.constants["0.weight"].tensor, before)
    shared = from_torch(module, torch.randn(1, 2), share_memory=True)
    assert shared.constants["0.weight"].tensor.data_ptr() == module[0].weight.data_ptr()


def test_an_exported_program_gives_the_same_graph_as_its_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim("n")},))
    graph = from_program(program, "net")
    assert graph == from_torch(module, (x,), "batch", "net")


def test_no_grad_wrappers_of_a_program_are_inlined():
    x = torch.randn(2, 4)
    program = torch.export.export(Calls().eval(), (x,))
    graph = from_program(program)
    assert all("higher_order" not in node.op for node in graph.iter_nodes())
    assert torch.equal(run(graph, {"x": x})["hidden"], program.module()(x)["hidden"])
