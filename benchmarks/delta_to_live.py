"""From `apply` called to the store after which every new request runs the new revision, journal
commit included.

BERT-base from config, two closed-loop clients in the process, one-node shape-preserving edits. The
peers make the same change to the same model
in processes of their own: torch.compile after editing the module, an edited ONNX file to a ready
ONNX Runtime session, OpenVINO from the edited model to a compiled one. Then the growth of `apply`
from 1,000 to 50,000 nodes.

    python benchmarks/delta_to_live.py [--deltas 200] [--no-peers]

ONNX Runtime, OpenVINO and the ONNX exporter (`pip install onnx onnxscript onnxruntime openvino`)
are absent from the table when not installed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

import graphopt
from benchmarks.harness import percentile, report

SEQUENCE = 128
WARMUP = 5


def main() -> None:
    """Runs all parts and prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deltas", type=int, default=200)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peer", choices=PEERS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(PEERS[options.peer]()))
        return
    rows = [graphopt_row("graphopt", None, options.deltas)]
    if Path("/dev/shm").is_dir():
        rows.append(graphopt_row("graphopt, journal in RAM", "/dev/shm", options.deltas))
    if not options.no_peers:
        for name in PEERS:
            rows.append(peer_row(name, rows[0]["p50_ms"]))
    report("delta_to_live", rows, scaling=scaling_rows())


def bert(act: torch.nn.Module | None = None) -> torch.nn.Module:
    """BERT-base with random weights of a fixed seed.

    `act` takes the place of one layer's activation.
    """
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig())
    if act is not None:
        model.bert.encoder.layer[6].intermediate.intermediate_act_fn = act
    return model.eval()


class Edited(torch.nn.Module):
    """GELU and the node the delta inserts after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """GELU, then a multiplication."""
        return torch.nn.functional.gelu(x) * 1.01


def example() -> dict[str, torch.Tensor]:
    """One sentence of SEQUENCE tokens."""
    ids = torch.randint(0, 1000, (1, SEQUENCE))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def graphopt_row(label: str, folder: str | None, n_deltas: int) -> dict[str, Any]:
    """Edits under two clients, the state in a folder below `folder` (None: the system's own).

    Beside each delta a bare 4 KB write and fdatasync in the same folder: the floor of durability.
    """
    shapes = {name: {0: "batch", 1: "seq"} for name in example()}
    graph = graphopt.from_torch(bert(), example(), dynamic_shapes=shapes, name="bert")
    target = next(
        id
        for id in graph.nodes
        if id.startswith("bert.encoder.layer.6") and graph.nodes[id].op == "aten.gelu.default"
    )
    insert = {
        "delta": 1,
        "edits": [
            {
                "insert_after": {
                    "value": f"${target}",
                    "id": "probe",
                    "op": "aten.mul.Scalar",
                    "args": [f"${target}", 1.01],
                }
            }
        ],
    }
    remove = {"delta": 1, "edits": [{"bypass": {"node": "probe"}}]}
    live, returned, latencies, shares, after, floor = [], [], [], [], [], []
    with (
        tempfile.TemporaryDirectory(dir=folder) as state,
        graphopt.Engine(graph, graphopt.EngineSettings(), state_dir=state) as engine,
    ):
        engine.settle(300)
        stop = threading.Event()
        clients = [
            threading.Thread(target=_client, args=(engine, stop, latencies)) for _ in range(2)
        ]
        for client in clients:
            client.start()
        for i in range(n_deltas + WARMUP):
            start = time.perf_counter()
            applied = engine.apply(insert if i % 2 == 0 else remove)
            end = time.perf_counter()
            engine.run(example())
            if i >= WARMUP:
                live.append(applied.live_s * 1e3)
                returned.append((end - start) * 1e3)
                after.append((time.perf_counter() - end) * 1e3)
                shares.append(applied.inferred_nodes / len(graph))
                floor.append(_sync_s(Path(state)) * 1e3)
        stop.set()
        for client in clients:
            client.join()
    return {
        "system": label,
        "p50_ms": statistics.median(live),
        "p99_ms": percentile(live, 0.99),
        "fdatasync_p50_ms": statistics.median(floor),
        "fdatasync_p99_ms": percentile(floor, 0.99),
        "return_p50_ms": statistics.median(returned),
        "first_request_p50_ms": statistics.median(after),
        "client_p50_ms": statistics.median(latencies) * 1e3,
        "inferred_share": max(shares),
        "times_slower": 1.0,
    }


def _sync_s(folder: Path) -> float:
    """What one small write costs until it is durable."""
    with (folder / "floor").open("ab", buffering=0) as file:
        start = time.perf_counter()
        file.write(bytes(4096))
        os.fdatasync(file.fileno())
        return time.perf_counter() - start


def _client(engine: graphopt.Engine, stop: threading.Event, latencies: list[float]) -> None:
    torch.set_num_threads(1)
    inputs = example()
    while not stop.is_set():
        start = time.perf_counter()
        engine.run(inputs)
        latencies.append(time.perf_counter() - start)


def scaling_rows() -> list[dict[str, Any]]:
    """`apply` without clients on graphs of growing size, in turn; the journal is included."""
    sizes = (1_000, 5_000, 20_000, 50_000)
    live: dict[int, list[float]] = {n_nodes: [] for n_nodes in sizes}
    settings = graphopt.EngineSettings(improve=False)
    with ExitStack() as stack:
        engines = {}
        for n_nodes in sizes:
            state = stack.enter_context(tempfile.TemporaryDirectory())
            engine = graphopt.Engine(_chain(n_nodes), settings, state_dir=state)
            engines[n_nodes] = stack.enter_context(engine)
        for i in range(110):
            for n_nodes, engine in engines.items():
                node = f"layer.{n_nodes // 8}/scale"
                edit = {"set_attr": {"node": node, "name": "other", "value": 1.0 + i / 100}}
                applied = engine.apply({"delta": 1, "edits": [edit]})
                if i >= 10:
                    live[n_nodes].append(applied.live_s * 1e3)
    rows: list[dict[str, Any]] = [
        {"nodes": n, "p50_ms": statistics.median(times)} for n, times in live.items()
    ]
    for row in rows:
        row["growth"] = row["p50_ms"] / rows[0]["p50_ms"]
    report("delta_scaling", rows)
    return rows


def _chain(n_nodes: int) -> graphopt.Graph:
    """Residual layers of four nodes each.

    All share one weight, so that size is nodes and not bytes.
    """
    from graphopt.constants import constant_of
    from graphopt.types import TensorType

    weight = constant_of(torch.eye(16), is_param=True)
    nodes, value = [], "x"
    for i in range(n_nodes // 4):
        stem = f"layer.{i}"
        nodes.append(
            graphopt.Node(
                stem, "aten.linear.default", (graphopt.Ref(value), graphopt.Const("weight"))
            )
        )
        nodes.append(graphopt.Node(f"{stem}/relu", "aten.relu.default", (graphopt.Ref(stem),)))
        nodes.append(
            graphopt.Node(f"{stem}/scale", "aten.mul.Scalar", (graphopt.Ref(f"{stem}/relu"), 0.5))
        )
        nodes.append(
            graphopt.Node(
                f"{stem}/add",
                "aten.add.Tensor",
                (graphopt.Ref(f"{stem}/scale"), graphopt.Ref(value)),
            )
        )
        value = f"{stem}/add"
    return graphopt.Graph.build(
        "chain",
        nodes,
        [("x", TensorType("f32", (4, 16)))],
        [("output", graphopt.Ref(value))],
        {"weight": weight},
    )


def peer_row(name: str, reference_ms: float) -> dict[str, Any]:
    """One peer in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.delta_to_live", "--peer", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"system": name, "note": (done.stderr.strip().splitlines() or ["failed"])[-1][:100]}
    times = json.loads(done.stdout.strip().splitlines()[-1])
    p50 = statistics.median(times) * 1e3
    return {"system": name, "p50_ms": p50, "times_slower": p50 / reference_ms}


def torch_compile() -> list[float]:
    """Editing the module, to the first answer of the compiled one."""
    inputs, times = example(), []
    with torch.inference_mode():
        compiled = torch.compile(bert())
        compiled(**inputs)
        torch._dynamo.reset()
        start = time.perf_counter()
        torch.compile(bert(Edited()))(**inputs)
        times.append(time.perf_counter() - start)
    return times


def onnxruntime() -> list[float]:
    """An edited ONNX file to a ready session."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        path = _onnx_file(Path(folder))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            times.append(time.perf_counter() - start)
    return times


def openvino() -> list[float]:
    """The edited model to a compiled one."""
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        path = _onnx_file(Path(folder))
        core, times = ov.Core(), []
        model = core.read_model(str(path))
        for _ in range(5):
            start = time.perf_counter()
            core.compile_model(model, "CPU")
            times.append(time.perf_counter() - start)
    return times


def _onnx_file(folder: Path) -> Path:
    if importlib.util.find_spec("onnxscript") is None:
        raise SystemExit("onnxscript is not installed")
    path = folder / "bert.onnx"
    inputs = example()
    torch.onnx.export(bert(Edited()), (), str(path), kwargs=inputs, dynamo=True, verbose=False)
    return path


PEERS = {"torch.compile": torch_compile, "onnxruntime": onnxruntime, "openvino": openvino}

if __name__ == "__main__":
    main()
