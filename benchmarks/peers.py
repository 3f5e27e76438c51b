"""The systems that serve a network of the zoo: what each can be set to, and how it is called.

Requests are called as a careful user calls them: inputs and outputs bound once, nothing copied.
graphopt is called as the module is, `engine(*inputs)`, and answers fresh tensors.

Nothing here imports torch before a system that needs it does: the runtimes are measured without it.
torch.compile is left at its default code generation: `max-autotune` and the C++ wrapper take
minutes a network.

    python -m benchmarks.peers     # which systems are installed
"""

import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.choosing import Client, Connect, Job, Settings, System

WATCH_S = 20.0  # patience with a plan under watch: afterwards is the steady state


class Eager:
    """torch as it is, in inference mode."""

    packages: tuple[str, ...] = ("torch",)

    def __init__(self) -> None:
        self.module: Any = None

    def axes(self, job: Job) -> dict[str, list[str]]:
        """What there is to choose from."""
        threads = [str(job.threads), "1"] if not job.clients else ["1", str(job.threads)]
        axes = {"threads": list(dict.fromkeys(threads))}
        if "pixel_values" in job.inputs:
            axes["layout"] = ["contiguous", "channels last"]
        return axes

    def open(self, job: Job, settings: Settings) -> Connect:
        """Opens it at one setting."""
        import torch

        tensors = _tensors(job)
        self.module = self.module or _module(job)
        module = self.module
        if settings.get("layout") == "channels last":
            tensors = tuple(tensor.to(memory_format=torch.channels_last) for tensor in tensors)
            module = _module(job).to(memory_format=torch.channels_last)
        connect = _torch_connect(module, tensors, int(settings["threads"]))

        def connect_in_inference_mode() -> Client:
            torch.inference_mode().__enter__()  # for the rest of the thread: not a cost of each call
            return connect()

        return connect_in_inference_mode

    def notes(self) -> str:
        """Nothing to add."""
        return ""


class Compile:
    """torch.compile with inductor's freezing, static shapes."""

    packages: tuple[str, ...] = ("torch",)

    def __init__(self) -> None:
        self.module: Any = None

    def axes(self, job: Job) -> dict[str, list[str]]:
        """What there is to choose from."""
        return {}

    def open(self, job: Job, settings: Settings) -> Connect:
        """Opens it at one setting."""
        import torch
        import torch._inductor.config

        threads = 1 if job.clients else job.threads
        torch.set_num_threads(threads)
        torch._inductor.config.freezing = True
        self.module = self.module or _module(job)
        compiled = torch.compile(self.module, dynamic=False)
        return _torch_connect(compiled, _tensors(job), threads)

    def notes(self) -> str:
        """Nothing to add."""
        return ""


class OnnxRuntime:
    """One session, all graph optimisations, inputs and output bound."""

    packages: tuple[str, ...] = ("onnxruntime", "onnx", "onnxscript")

    def axes(self, job: Job) -> dict[str, list[str]]:
        """What there is to choose from."""
        alone, every = ["1"], [str(job.threads)]
        threads = alone + every if job.clients else every + alone
        return {
            "export": ["dynamo", "script"],
            "shapes": ["static", "dynamic"],
            "threads": list(dict.fromkeys(threads)),
            "spinning": ["off", "on"] if job.clients else ["on", "off"],
        }

    def open(self, job: Job, settings: Settings) -> Connect:
        """Opens it at one setting."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = int(settings["threads"])
        options.inter_op_num_threads = 1
        spins = "1" if settings["spinning"] == "on" else "0"
        options.add_session_config_entry("session.intra_op.allow_spinning", spins)
        options.log_severity_level = 3
        if settings["shapes"] == "static":
            for name, size in job.sizes.items():
                options.add_free_dimension_override_by_name(name, size)
        path = job.folder / f"{settings['export']}.onnx"
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def connect() -> Client:
            binding, output = session.io_binding(), np.empty_like(job.reference)
            for name, array in job.inputs.items():
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            name = session.get_outputs()[0].name
            binding.bind_output(name, "cpu", 0, output.dtype, output.shape, output.ctypes.data)

            def call() -> np.ndarray:
                session.run_with_iobinding(binding)
                return output

            return call

        return connect

    def notes(self) -> str:
        """Nothing to add."""
        return ""


class OpenVino:
    """One compiled model, float32, tensors preset on each client's request."""

    packages: tuple[str, ...] = ("openvino",)

    def axes(self, job: Job) -> dict[str, list[str]]:
        """What there is to choose from."""
        axes = {
            "export": ["program", "trace", "dynamo", "script"],
            "shapes": ["static", "dynamic"],
        }
        if job.clients:
            return axes | {"hint": ["THROUGHPUT", "LATENCY"], "call": ["async", "infer"]}
        return axes | {"threads": list(dict.fromkeys([str(job.threads), "1"]))}

    def open(self, job: Job, settings: Settings) -> Connect:
        """Opens it at one setting."""
        import openvino as ov

        export = settings["export"]
        suffix = "xml" if export in ("program", "trace") else "onnx"
        core = ov.Core()
        model = core.read_model(str(job.folder / f"{export}.{suffix}"))
        if settings["shapes"] == "static":
            shapes = [list(array.shape) for array in job.inputs.values()]
            model.reshape(dict(zip(model.inputs, shapes, strict=True)))
        config = {
            "PERFORMANCE_HINT": settings.get("hint", "LATENCY"),
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": settings.get("threads", str(job.threads)),
        }
        compiled = core.compile_model(model, "CPU", config)

        def connect() -> Client:
            request, output = compiled.create_infer_request(), np.empty_like(job.reference)
            for i, array in enumerate(job.inputs.values()):
                request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
            request.set_output_tensor(ov.Tensor(output, shared_memory=True))

            def infer() -> np.ndarray:
                request.infer(share_inputs=True, share_outputs=True)
                return output

            def start_and_wait() -> np.ndarray:
                request.start_async()
                request.wait()
                return output

            return start_and_wait if settings.get("call") == "async" else infer

        return connect

    def notes(self) -> str:
        """Nothing to add."""
        return ""


class Graphopt:
    """One engine for all batches: it sees traffic, settles, and is called as the module is."""

    packages: tuple[str, ...] = ("graphopt",)
    traffic_s = 1.0  # before each settling
    traffic_calls = 20  # at least

    def __init__(self) -> None:
        self.engine: Any = None
        self.seen: dict[int, bool] = {}  # whether it settled, by batch

    def axes(self, job: Job) -> dict[str, list[str]]:
        """What there is to choose from."""
        return {}

    def open(self, job: Job, settings: Settings) -> Connect:
        """Opens it at one setting."""
        import torch

        import graphopt

        intra_op = 1 if job.clients else job.threads
        if self.engine is None:
            graph = _network(job).graph()
            threads = job.threads if job.clients else 1
            engine_settings = graphopt.EngineSettings(threads=threads, intra_op=intra_op)
            self.engine = graphopt.Engine(graph, engine_settings)
        engine, tensors = self.engine, _tensors(job)

        def connect() -> Client:
            torch.set_num_threads(intra_op)
            return lambda: engine(*tensors)

        client = connect()
        settled = True
        for _ in range(2):  # what the first settling published may show the second one more
            start, calls = time.perf_counter(), 0
            while calls < self.traffic_calls or time.perf_counter() - start < self.traffic_s:
                client()
                calls += 1
            settled = self.engine.settle(timeout_s=job.settle_s)
        start = time.perf_counter()
        while self.engine.explain().phase != "idle" and time.perf_counter() - start < WATCH_S:
            client()
        self.seen[job.batch] = settled
        return connect

    def notes(self) -> str:
        """The tiers of the plan and how they run, and batches at which it did not settle."""
        steps = self.engine.explain().steps
        tiers = Counter(f"{line.tier} {line.options}".strip() for line in steps)
        parts = [f"{count} {tier}" for tier, count in sorted(tiers.items())]
        parts += [f"not settled at batch {b}" for b, settled in self.seen.items() if not settled]
        return ", ".join(parts)


SYSTEMS: dict[str, Callable[[], System]] = {
    "graphopt": Graphopt, "eager": Eager, "compile": Compile, "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}  # fmt: skip


def missing(system: str) -> list[str]:
    """The packages that `system` needs and that are not installed."""
    absent = []
    for package in SYSTEMS[system]().packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(package)
    return [package for package in absent if package != "graphopt"]  # it may run from its checkout


def _network(job: Job) -> Any:
    from benchmarks import zoo

    return zoo.build(job.model)


def _module(job: Job) -> Any:
    return _network(job).module


def _tensors(job: Job) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(array) for array in job.inputs.values())


def _torch_connect(module: Any, tensors: tuple[Any, ...], threads: int) -> Connect:
    import torch

    def connect() -> Client:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        return lambda: module(*tensors)

    return connect


def main() -> None:
    """Prints the systems and what they lack."""
    for name in SYSTEMS:
        print(name, "needs " + ", ".join(missing(name)) if missing(name) else "is here")


if __name__ == "__main__":
    main()
