"""What the runtimes read: one network of the zoo exported in every way a user would try, once a run.

The files of a network lie in one folder: ONNX from both exporters of torch, OpenVINO's IR from a
traced module and from an exported program; beside them the inputs and the answers of eager float32
that every system is held to. An export that fails leaves a line in `failed.json` and no file.

Absent: ONNX Runtime's offline transformer tool. With today's transformers it finds no attention to
fuse, exported as `sdpa` or as `eager`, and its files were no faster than what the session fuses
itself (BERT-mini, ViT-tiny).
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import zoo
from benchmarks.zoo import TRACED_BATCH, Network


def write_references(network: Network, batches: list[int], folder: Path) -> None:
    """The inputs of each batch, its dynamic dims and the answers of eager float32."""
    for batch in batches:
        inputs = network.inputs(batch)
        with torch.inference_mode():
            answer = network.module(*inputs.values())
        np.savez(folder / f"inputs-{batch}.npz", **{k: v.numpy() for k, v in inputs.items()})
        np.save(folder / f"reference-{batch}.npy", answer.numpy())
        (folder / f"sizes-{batch}.json").write_text(json.dumps(network.sizes(batch)))


def write_exports(network: Network, folder: Path, systems: list[str]) -> None:
    """The files of the runtimes among `systems`."""
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    writers: dict[str, Callable[[Network, Path], None]] = {}
    if {"onnxruntime", "openvino"} & set(systems):
        writers |= {"dynamo.onnx": _dynamo, "script.onnx": _script}
    if "openvino" in systems:
        writers |= {"trace.xml": _trace, "program.xml": _program}
    failed = {}
    for file, write in writers.items():
        try:
            write(network, folder / file)
        except Exception as error:
            failed[file] = f"{type(error).__name__}: {error}"[:300]
            for left in folder.glob(f"{file}*"):
                left.unlink()
    (folder / "failed.json").write_text(json.dumps(failed))


def _dynamo(network: Network, path: Path) -> None:
    shapes = {name: dict(dims) for name, dims in network.dynamic.items()}
    _onnx(network, path, dynamo=True, dynamic_shapes=tuple(shapes.values()), optimize=True)


def _script(network: Network, path: Path) -> None:
    axes = {name: dict(dims) for name, dims in network.dynamic.items()}
    _onnx(network, path, dynamo=False, dynamic_axes=axes)


def _onnx(network: Network, path: Path, **options: Any) -> None:
    inputs = network.inputs(TRACED_BATCH)
    names = {"input_names": list(inputs), "output_names": ["output"]}
    with torch.no_grad():
        torch.onnx.export(
            network.module, tuple(inputs.values()), str(path), verbose=False, **names, **options
        )


def _trace(network: Network, path: Path) -> None:
    import openvino as ov

    inputs = tuple(network.inputs(TRACED_BATCH).values())
    _save_ir(ov.convert_model(network.module, example_input=inputs), network, path)


def _program(network: Network, path: Path) -> None:
    import openvino as ov

    inputs = tuple(network.inputs(TRACED_BATCH).values())
    dims = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in network.dynamic.values())
    with torch.no_grad():
        program = torch.export.export(network.module, inputs, dynamic_shapes=dims)
    _save_ir(ov.convert_model(program), network, path)


def _save_ir(model: Any, network: Network, path: Path) -> None:
    import openvino as ov

    shapes = {}
    for port, (name, axes) in zip(model.inputs, network.dynamic.items(), strict=True):
        sizes = list(network.inputs(TRACED_BATCH)[name].shape)
        shapes[port] = ov.PartialShape([-1 if i in axes else n for i, n in enumerate(sizes)])
    model.reshape(shapes)
    ov.save_model(model, str(path), compress_to_fp16=False)


def main() -> None:
    """Fills the folder of one network: `python -m benchmarks.exports --model mlp ...`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--systems", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--bundle", action="store_true", help="graphopt's own file as well")
    options = parser.parse_args()
    if options.model:
        network = zoo.build(options.model)
        options.folder.mkdir(parents=True, exist_ok=True)
        write_references(network, [int(b) for b in options.batches.split(",")], options.folder)
        write_exports(network, options.folder, options.systems.split(","))
        if options.bundle:
            network.graph().save(options.folder / "bundle")


if __name__ == "__main__":
    main()
