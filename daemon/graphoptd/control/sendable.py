"""Which files may go over the control socket, decided alike by the client and the service.

Only data goes: safetensors, JSON and the text form. Formats that run code when they are read are
refused by name with what to do instead; what is inside a file its reader checks.
"""

import re

from graphopt.errors import BundleError, LimitError, ProtocolError

FILE_NAME_CHARS_MAX = 255  # NAME_MAX of Linux
FILE_BYTES_MAX = 64 << 30  # one file; bundles are split at 2 GB, the largest shards met have 50 GB
DELTA_BYTES_MAX = 16 << 30  # all files of one delta: they are copied into memory before it is tried
BUNDLE_BYTES_MAX = 2 << 40  # all files of one bundle

DELTA_SUFFIXES = (".safetensors", ".json")  # what deltas read out of a folder
REFUSED_BY_READER = (
    "adapter_model.bin"  # goes as a name, so that the adapter reader says the remedy
)
BUNDLE_NAME = re.compile(r"manifest\.json|graph\.txt|constants-[0-9]{5}-of-[0-9]{5}\.safetensors")

_RUNNABLE = (".pt2", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")


def check_name(name: str, *, where: str = "") -> None:
    """Refuses a name that is no plain file name, and formats that are pickles or archives.

    Raises:
        ProtocolError: the name has a separator or a NUL, or is empty, `.` or `..`.
        BundleError: a `.pt2`, a pickle, or the like; the remedy says how to convert it.
    """
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ProtocolError(
            f"{name[:80]!r} is no file name", where=where or "files", remedy="send plain names"
        )
    if len(name) > FILE_NAME_CHARS_MAX:
        raise ProtocolError("the file name is too long", where=where or "files")
    suffix = "." + name.rpartition(".")[2].lower()
    if suffix not in _RUNNABLE or name == REFUSED_BY_READER:
        return
    if suffix == ".pt2":
        remedy = f"import it as yourself: graphopt import {name} -o BUNDLE, then load the bundle"
    else:
        remedy = "convert it with safetensors.torch.save_file"
    raise BundleError(
        f"{suffix} files are archives that can run code, so the service never reads one",
        where=where or name,
        remedy=remedy,
    )


def check_size(size_bytes: int, bytes_max: int, where: str) -> None:
    """Raises LimitError when a file, or all files of a call, are larger than is taken."""
    if size_bytes > bytes_max:
        raise LimitError(
            f"{size_bytes} bytes, at most {bytes_max} are taken",
            where=where,
            remedy="send less at once",
        )
