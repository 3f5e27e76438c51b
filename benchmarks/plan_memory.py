"""The memory of a server of BERT-base: settled, while a part of the model changes, and afterwards.

    python -m benchmarks.plan_memory [--model bert-base] [--systems graphopt,onnxruntime,openvino]

Each system serves the model in a process of its own that has seen requests. graphopt then takes new
matrices of its middle encoder layer as a delta and settles; the others, which cannot change a
loaded model, load it a second time from its file before they let go of the first. `peak_extra` is
the kernel's own high-water mark of resident memory (VmHWM, reset before) over what is resident
before or after, whichever is less: what lay around unused before is no credit. `peak_extra_anon` is
the same of anonymous memory, looked at every 2 ms. Mapped files are shared: PSS counts them by
halves where two processes map them, and the kernel may drop them.

graphopt's bound: the changed constants plus 1.2 times the constants of the regions that were built
again, which stand for their artifacts. The builder process is counted in columns of its own.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.choosing import Client

MB = 1e6
ARTIFACT_SHARE = 1.2
SETTLE_S = 300.0
REQUESTS = 20
LOOK_S = 0.002
Snapshot = dict[str, float]


def main() -> None:
    """Runs every system in its own process and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="bert-base")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--system", choices=SYSTEMS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.system:
        answers = os.dup(1)
        os.dup2(2, 1)  # what libraries print
        os.write(answers, json.dumps(SYSTEMS[options.system](options.folder)).encode())
        return
    from benchmarks.harness import report

    systems = options.systems.split(",")
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
        _prepare(options.model, Path(folder), systems)
        rows = [_row(name, Path(folder)) for name in systems]
    report("plan_memory", rows, model=options.model)


def graphopt(folder: Path) -> dict[str, Any]:
    """An engine with a state folder, so that constants are its blobs."""
    import torch

    import graphopt
    from benchmarks import zoo

    before = snapshot()
    with tempfile.TemporaryDirectory(dir=folder) as state:
        engine = graphopt.Engine(graphopt.load(folder / "bundle"), state_dir=state)
        with engine, np.load(folder / "inputs-1.npz") as file:
            tensors = tuple(torch.from_numpy(file[name]) for name in file.files)
            for _ in range(2):
                _serve(lambda: engine(*tensors))
                settled = engine.settle(SETTLE_S)
            gc.collect()
            idle = snapshot()
            old = _tiers(engine.explain())
            layers = zoo.layer_weights(engine.graph)
            changed = layers[len(layers) // 2]
            tensors_of = {name: engine.graph.constants[name].tensor * 1.001 for name in changed}
            delta = graphopt.Delta([graphopt.PutConstant(n, t) for n, t in tensors_of.items()])

            def swap() -> None:
                engine.apply(delta)
                for _ in range(2):
                    _serve(lambda: engine(*tensors))
                    engine.settle(SETTLE_S)

            changed_bytes = sum(tensor.nbytes for tensor in tensors_of.values())
            del tensors_of
            peak = watched(swap)
            gc.collect()
            after, new = snapshot(), _tiers(engine.explain())
            rebuilt = _rebuilt_bytes(engine, set(changed))
    bound = changed_bytes + ARTIFACT_SHARE * rebuilt
    return {
        **_figures(before, idle, peak, after),
        "changed_mb": changed_bytes / MB,
        "rebuilt_mb": rebuilt / MB,
        "bound_mb": bound / MB,
        "verdict": "yes" if peak["extra"] <= bound else "NO",
        "note": f"{old}, then {new}" + ("" if settled else ", busy"),
    }


def onnxruntime(folder: Path) -> dict[str, Any]:
    """A session of the exported file."""
    import onnxruntime as ort

    with np.load(folder / "inputs-1.npz") as file:
        feed = {name: file[name] for name in file.files}

    def load() -> Client:
        path = str(folder / "dynamo.onnx")
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feed)

    return _reloaded(load)


def openvino(folder: Path) -> dict[str, Any]:
    """A compiled model of the exported program's IR, float32."""
    import openvino as ov

    with np.load(folder / "inputs-1.npz") as file:
        arrays = [file[name] for name in file.files]

    def load() -> Client:
        core = ov.Core()
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        model = core.read_model(str(folder / "program.xml"))
        request = core.compile_model(model, "CPU", config).create_infer_request()
        return lambda: request.infer(arrays)

    return _reloaded(load)


def watched(work: Callable[[], None]) -> Snapshot:
    """The peak of resident and anonymous memory during `work` over the lesser of before and after.

    In bytes; `builder` is the peak of the processes that this one has started, in all.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before = _status()
    peak = {"anon": before["RssAnon"], "builder": 0.0}
    done = threading.Event()
    me = psutil.Process()

    def look() -> None:
        looks = 0
        while not done.wait(LOOK_S):
            peak["anon"] = max(peak["anon"], _status()["RssAnon"])
            looks += 1
            if looks % 10 == 0:
                peak["builder"] = max(peak["builder"], _children_bytes(me))

    watcher = threading.Thread(target=look)
    watcher.start()
    work()
    done.set()
    watcher.join()
    high = _status()["VmHWM"]
    gc.collect()
    after = _status()
    return {
        "extra": high - min(before["VmRSS"], after["VmRSS"]),
        "extra_anon": peak["anon"] - min(before["RssAnon"], after["RssAnon"]),
        "builder": peak["builder"],
    }


def snapshot() -> Snapshot:
    """This process's memory as the kernel counts it, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {key.rstrip(":"): int(value) * 1024.0 for key, value, *_ in map(str.split, lines)}


def _prepare(model: str, folder: Path, systems: list[str]) -> None:
    """The files of each system, written by a process that ends."""
    command = [sys.executable, "-m", "benchmarks.exports", "--model", model, "--batches", "1"]
    command += ["--systems", ",".join(systems), "--folder", str(folder), "--bundle"]
    subprocess.run(command, check=True, capture_output=True)


def _row(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.plan_memory", "--system", name]
    done = subprocess.run(
        [*command, "--folder", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {"system": name, "note": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return {"system": name, **json.loads(done.stdout)}


def _reloaded(load: Callable[[], Client]) -> dict[str, Any]:
    """A server that loads its model again beside the one that serves, then lets that one go."""
    before = snapshot()
    serving = [load()]
    _serve(serving[0])
    idle = snapshot()

    def reload() -> None:
        fresh = load()
        _serve(fresh)
        serving[0] = fresh

    peak = watched(reload)
    gc.collect()
    return _figures(before, idle, peak, snapshot())


def _serve(call: Client) -> None:
    for _ in range(REQUESTS):
        call()


def _figures(before: Snapshot, idle: Snapshot, peak: Snapshot, after: Snapshot) -> dict[str, Any]:
    return {
        "imports_mb": before["Rss"] / MB,
        "rss_mb": idle["Rss"] / MB,
        "pss_mb": idle["Pss"] / MB,
        "anon_mb": idle["Pss_Anon"] / MB,
        "file_mb": idle["Pss_File"] / MB,
        "peak_extra_mb": peak["extra"] / MB,
        "peak_extra_anon_mb": peak["extra_anon"] / MB,
        "after_rss_mb": after["Rss"] / MB,
        "builder_peak_mb": peak["builder"] / MB,
    }


def _rebuilt_bytes(engine: Any, changed: set[str]) -> int:
    """The constants of the regions of the plan that read a changed constant."""
    graph, found = engine.graph, set()
    for step in engine.model.slot.plan.steps:
        names = {graph.aliases.get(c, c) for id in step.nodes for c in graph.nodes[id].consts}
        if names & changed:
            found |= names
    return sum(graph.constants[name].tensor.nbytes for name in found)


def _tiers(explanation: Any) -> str:
    counts = Counter(line.tier for line in explanation.steps)
    return " ".join(f"{count} {tier}" for tier, count in sorted(counts.items()))


def _children_bytes(process: psutil.Process) -> float:
    total = 0.0
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _status() -> Snapshot:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        key: int(rest.split()[0]) * 1024.0
        for key, _, rest in (line.partition(":") for line in lines)
        if key in ("VmHWM", "VmRSS", "RssAnon")
    }


SYSTEMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "graphopt": graphopt, "onnxruntime": onnxruntime, "openvino": openvino,
}  # fmt: skip


if __name__ == "__main__":
    main()
