"""What the service says about itself and its models: metadata, health, configuration, statistics, index."""

from typing import Any

from graphoptd.data.datatypes import DATATYPES
from graphoptd.data.encode import Answer, json_answer
from graphoptd.data.lanes import Lane, Lanes
from graphoptd.data.served import Directory, TensorSpec
from graphoptd.data.settings import DataSettings

PLATFORM = "graphopt"


def server_metadata(version: str, settings: DataSettings) -> Answer:
    """Name, version and the extensions that answer."""
    extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
    if settings.shared_memory:
        extensions.append("system_shared_memory")
    return json_answer({"name": "graphoptd", "version": version, "extensions": extensions})


def live(directory: Directory) -> Answer:
    """Always 200: whoever reads it, the event loop answered. kserve needs the body."""
    return json_answer({"live": True, "ready": directory.ready()})


def ready(directory: Directory) -> Answer:
    """200 when every loaded model serves, else 400 as the protocol says."""
    if directory.ready():
        return json_answer({"live": True, "ready": True})
    waiting = [
        f"{entry.name} is {entry.state}" for entry in directory.index() if entry.state != "READY"
    ]
    text = "not ready: " + (", ".join(waiting[:8]) or "starting")
    return json_answer({"live": True, "ready": False, "error": text, "code": "not_ready"}, 400)


def model_ready(directory: Directory, name: str, version: str | None) -> Answer:
    """200 when the model (and version) serves, else 400, also for unknown ones."""
    served = directory.find(name)
    is_current = served is not None and version in (None, str(served.signature().revision))
    if is_current:
        return json_answer({"name": name, "ready": True})
    what = "the model" if served is None else "the version"
    return json_answer(
        {"name": name, "ready": False, "error": f"{what} is not ready", "code": "not_ready"}, 400
    )


def model_metadata(lane: Lane) -> Answer:
    """Name, the one version that serves, and the tensors."""
    signature = lane.served.signature()
    return json_answer(
        {
            "name": lane.served.name,
            "versions": [str(signature.revision)],
            "platform": PLATFORM,
            "inputs": [_tensor(spec) for spec in signature.inputs],
            "outputs": [_tensor(spec) for spec in signature.outputs],
        }
    )


def model_config(lane: Lane, settings: DataSettings) -> Answer:
    """The part of a Triton model configuration that means something here."""
    interface = lane.interface()
    skip = 1 if interface.batchable else 0
    config: dict[str, Any] = {
        "name": lane.served.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": settings.batch_max if interface.batchable else 0,
        "input": [_config_tensor(spec, skip) for spec in interface.signature.inputs],
        "output": [_config_tensor(spec, skip) for spec in interface.signature.outputs],
    }
    if interface.batchable:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": settings.batch_delay_us}
    return json_answer(config)


def statistics(lanes: list[Lane]) -> Answer:
    """Counters of the models."""
    return json_answer(
        {
            "model_stats": [
                lane.statistics.as_json(lane.served.name, lane.served.signature().revision)
                for lane in lanes
            ]
        }
    )


def repository_index(directory: Directory, only_ready: bool) -> Answer:
    """Every model known; with `only_ready` those that serve."""
    rows: list[dict[str, Any]] = []
    for entry in directory.index():
        if only_ready and entry.state != "READY":
            continue
        row: dict[str, Any] = {"name": entry.name, "state": entry.state}
        if entry.revision is not None:
            row["version"] = str(entry.revision)
        if entry.reason:
            row["reason"] = entry.reason
        rows.append(row)
    return json_answer(rows)


def lanes_of(lanes: Lanes, name: str) -> list[Lane]:
    """One model's lane, or all when `name` is empty."""
    return [lanes.get(name)] if name else lanes.all()


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config_tensor(spec: TensorSpec, skip: int) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": DATATYPES[spec.datatype].config_name,
        "dims": list(spec.shape[skip:]),
    }
