"""A transformers folder on disk as a graph: offline, safetensors only, nothing downloaded or unpickled.

Text encoders and causal language models get `input_ids` and `attention_mask` with dynamic batch and
sequence; image models get `pixel_values` with a dynamic batch. Attention is imported as
`scaled_dot_product_attention` (`attn_implementation="sdpa"`): one op that every backend knows, instead
of the five of "eager", and its mask stays a context value computed once for all layers.

Deliberately absent: generation with a key-value cache, encoder-decoder models, audio, code that comes
with the model (`trust_remote_code`). Such a model can come in through `module:factory`.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from graphopt.errors import ImportRefusedError
from graphopt.frontend.names import unique_name
from graphopt.frontend.torch_export import from_torch
from graphopt.graph import Graph

TASKS = {
    "feature-extraction": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
    "image-feature-extraction": "AutoModel",
}
EXAMPLE_BATCH = 2
EXAMPLE_TOKENS = 8
IMAGE_SIDE_DEFAULT = 224  # of folders that say nothing: the side of ImageNet models
TEXT_INPUTS = ("input_ids", "attention_mask")
# These number positions from padding_idx + 1, so that many rows of the table are never reached.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})
_FACTORY = "write a factory that returns (module, example_inputs, dynamic_shapes): module:factory"


def from_folder(
    folder: str | Path, *, task: str | None = None, inputs: Sequence[str] = (), name: str = ""
) -> Graph:
    """The graph of the model in a transformers folder.

    Args:
        folder: holds config.json and *.safetensors.
        task: a key of `TASKS`; by default the class that the folder was saved with.
        inputs: names of the text inputs, when not `input_ids` and `attention_mask`
            (`token_type_ids` for sentence pairs).
        name: the graph's name; by default the folder's.

    Raises:
        ImportRefusedError: transformers is missing, the folder is not usable, or the model is.
    """
    path = Path(folder)
    _check_folder(path)
    model = _load(_transformers(), path, task)
    _prepare(model, path)
    examples, shapes = _examples(model, path, inputs)
    wanted = unique_name(name or path.resolve().name, ())
    return from_torch(model, examples, shapes, wanted, share_memory=True)


def from_model(model: Any, name: str, *, inputs: Sequence[str] = ()) -> Graph:
    """The graph of a transformers model in memory, with the inputs and dims of `from_folder`.

    Constants are copies. `model.config.use_cache` is switched off.
    """
    _prepare(model, Path())
    examples, shapes = _examples(model, Path(), inputs)
    return from_torch(model, examples, shapes, name)


def _transformers() -> Any:
    try:
        transformers: Any = import_module("transformers")  # optional, only for this source
    except ImportError as error:
        raise ImportRefusedError(
            "transformers is not installed",
            where="hf:",
            remedy="pip install transformers, in the environment that graphopt runs in",
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ImportRefusedError(
            "no such folder",
            where=str(path),
            remedy="models are not downloaded: give a local folder",
        )
    if not (path / "config.json").is_file():
        raise ImportRefusedError(
            "holds no config.json",
            where=str(path),
            remedy="give the folder that save_pretrained wrote",
        )
    if not any(path.glob("*.safetensors")):
        unsafe = sorted(p.name for p in (*path.glob("*.bin"), *path.glob("*.pt")))
        what = f"holds {unsafe[0]} but no" if unsafe else "holds no"
        raise ImportRefusedError(
            f"{what} *.safetensors",
            where=str(path),
            remedy="pickled weights can run code and are not read: load it where you trust it and "
            "call model.save_pretrained(folder, safe_serialization=True)",
        )


def _load(transformers: Any, path: Path, task: str | None) -> Any:
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **offline)
        model_class = _model_class(transformers, config, path, task)
        options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, **offline}
        model, info = _from_pretrained(model_class, path, options)
        missing = sorted(info["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing):
            # A pooler that was never trained would only put noise beside the answer.
            model, info = model_class.from_pretrained(path, add_pooling_layer=False, **options)
            missing = sorted(info["missing_keys"])
    except ImportRefusedError:
        raise
    except Exception as error:
        raise ImportRefusedError(
            f"transformers cannot load it: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=str(path),
            remedy=_FACTORY,
        ) from error
    if missing:
        raise ImportRefusedError(
            f"the folder has no weights for {', '.join(missing[:3])}",
            where=f"{path} as {model_class.__name__}",
            remedy=f"choose the task it was trained for: --task {'|'.join(TASKS)}",
        )
    return model


def _from_pretrained(model_class: Any, path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return model_class.from_pretrained(path, attn_implementation="sdpa", **options)  # type: ignore[no-any-return]
    except ValueError as error:
        if "attn_implementation" not in str(error) and "scaled_dot_product" not in str(error):
            raise
        return model_class.from_pretrained(path, **options)  # type: ignore[no-any-return]


def _model_class(transformers: Any, config: Any, path: Path, task: str | None) -> Any:
    if task is not None:
        if task not in TASKS:
            raise ImportRefusedError(
                f"unknown task {task!r}",
                where=str(path),
                remedy=f"choose one of {', '.join(TASKS)}",
            )
        return getattr(transformers, TASKS[task])
    architectures = config.architectures or []
    found = getattr(transformers, architectures[0], None) if architectures else None
    if found is None:
        raise ImportRefusedError(
            f"config.json names no model class that this transformers has ({architectures})",
            where=str(path),
            remedy=f"say what it is for: --task {'|'.join(TASKS)}",
        )
    return found


def _prepare(model: Any, path: Path) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ImportRefusedError(
            "encoder-decoder models answer by a loop of calls, which a graph does not hold",
            where=str(path) if path.name else type(model).__name__,
            remedy=f"import the encoder alone: {_FACTORY}",
        )
    if hasattr(config, "use_cache"):
        config.use_cache = False
    config.return_dict = True
    model.eval()


def _examples(
    model: Any, path: Path, inputs: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    main = getattr(model, "main_input_name", "input_ids")
    batch = Dim("batch", min=1)
    if main == "input_ids":
        seq = Dim("seq", min=1, max=_positions(model.config))
        names = tuple(inputs) or TEXT_INPUTS
        ids = torch.ones(EXAMPLE_BATCH, EXAMPLE_TOKENS, dtype=torch.long)
        return dict.fromkeys(names, ids), {name: {0: batch, 1: seq} for name in names}
    if main == "pixel_values":
        height, width = _image_size(model.config, path)
        channels = getattr(model.config, "num_channels", 3)
        pixels = torch.zeros(EXAMPLE_BATCH, channels, height, width, dtype=model.dtype)
        return {main: pixels}, {main: {0: batch}}
    raise ImportRefusedError(
        f"its main input is {main}; only text and image models have known inputs",
        where=type(model).__name__,
        remedy=_FACTORY,
    )


def _positions(config: Any) -> int | None:
    """The longest sequence the position table or the training covers; None when nothing says."""
    count = getattr(config, "max_position_embeddings", None)
    if not isinstance(count, int) or count < 1:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return count - (config.pad_token_id or 0) - 1
    return count


def _image_size(config: Any, path: Path) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    processor = path / "preprocessor_config.json"
    if size is None and path.name and processor.is_file():
        settings = json.loads(processor.read_text())
        size = settings.get("crop_size") or settings.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge", IMAGE_SIDE_DEFAULT)
        size = (size.get("height", side), size.get("width", side))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    side = int(size or IMAGE_SIDE_DEFAULT)
    return side, side
