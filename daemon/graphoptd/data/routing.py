"""URLs to routes, by hand: a framework's router costs more than our parsing and decoding together.

`V` below is an optional `/versions/{version}`.
"""

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from graphoptd.data.answers import HttpError


@dataclass(frozen=True, slots=True)
class Route:
    """Where a path leads: a name of `METHODS`, and the names inside the path."""

    name: str
    model: str = ""
    version: str | None = None
    region: str | None = None


_READ = ("GET", "HEAD")
METHODS: dict[str, tuple[str, ...]] = {
    "server": _READ,  # /v2 and /v2/
    "live": _READ,  # /v2/health/live
    "ready": _READ,  # /v2/health/ready
    "statistics": _READ,  # /v2/models/stats, /v2/models/{model}V/stats
    "model": _READ,  # /v2/models/{model}V
    "model_ready": _READ,  # /v2/models/{model}V/ready
    "model_config": _READ,  # /v2/models/{model}V/config
    "infer": ("POST",),  # /v2/models/{model}V/infer
    "index": ("POST",),  # /v2/repository/index
    "load": ("POST",),  # /v2/repository/models/{model}/load
    "unload": ("POST",),  # /v2/repository/models/{model}/unload
    "shm_status": _READ,  # /v2/systemsharedmemory[/region/{region}]/status
    "shm_register": ("POST",),  # /v2/systemsharedmemory/region/{region}/register
    "shm_unregister": ("POST",),  # /v2/systemsharedmemory[/region/{region}]/unregister
}

_OF_MODEL = {
    "infer": "infer",
    "": "model",
    "ready": "model_ready",
    "config": "model_config",
    "stats": "statistics",
}
_SHARED_MEMORY = {
    "status": "shm_status",
    "register": "shm_register",
    "unregister": "shm_unregister",
}


@lru_cache(maxsize=256)  # clients ask for few paths, again and again; a hostile one can fill 4 MiB
def resolve(method: str, raw_path: bytes) -> Route:
    """The route of a request.

    Raises:
        HttpError: 404 when nothing is there, 405 with `Allow` when another method is.
    """
    route = _find(raw_path)
    if route is None:
        shown = raw_path[:128].decode("latin-1")
        raise HttpError(404, f"nothing at {shown!r}", remedy="GET /v2 lists the extensions served")
    allowed = METHODS[route.name]
    if method not in allowed:
        allow = ", ".join(allowed)
        raise HttpError(
            405,
            f"{method[:32]} is not allowed here",
            (b"allow", allow.encode()),
            remedy=f"use {allow}",
        )
    return route


def _find(raw_path: bytes) -> Route | None:
    try:
        parts = raw_path.decode("ascii").split("/")
        if b"%" in raw_path:
            parts = [unquote_to_bytes(part).decode() for part in parts]
    except UnicodeDecodeError:
        return None
    if len(parts) < 2 or parts[0] or parts[1] != "v2":
        return None
    match parts[2:]:
        case ["models", model, "infer"] if model:
            return Route("infer", model)
        case ["models", "stats"]:
            return Route("statistics")
        case ["models", model, "versions", version, *tail] if (
            version and len(tail) < 2 and tail != [""]
        ):
            return _of_model(model, version, tail)
        case ["models", model, *tail] if len(tail) < 2 and tail != [""]:
            return _of_model(model, None, tail)
        case [] | [""]:
            return Route("server")
        case ["health", ("live" | "ready") as what]:
            return Route(what)
        case ["repository", "index"]:
            return Route("index")
        case ["repository", "models", model, ("load" | "unload") as what] if model:
            return Route(what, model)
        case ["systemsharedmemory", ("status" | "unregister") as what]:
            return Route(_SHARED_MEMORY[what])
        case ["systemsharedmemory", "region", region, what] if region and what in _SHARED_MEMORY:
            return Route(_SHARED_MEMORY[what], region=region)
    return None


def _of_model(model: str, version: str | None, tail: list[str]) -> Route | None:
    name = _OF_MODEL.get(tail[0] if tail else "")
    return Route(name, model, version) if name and model else None
