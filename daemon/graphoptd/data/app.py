"""The data plane as an ASGI application: route, answer, turn every refusal into its HTTP form.

No framework: the routes are few, and the frameworks measured cost two to four times what the server
itself does.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sized
from concurrent.futures import ThreadPoolExecutor

from graphopt.errors import GraphoptError
from graphoptd.data import describe, repository
from graphoptd.data.answers import ClientGoneError, HttpError, error_answer, internal_answer
from graphoptd.data.body import Call, Message, Receive, Send, read_body
from graphoptd.data.budget import ByteBudget
from graphoptd.data.encode import JSON_TYPE, Answer, json_answer
from graphoptd.data.failures import Failures
from graphoptd.data.infer import Inference
from graphoptd.data.lanes import Lanes, check_version
from graphoptd.data.routing import resolve
from graphoptd.data.served import Directory
from graphoptd.data.settings import DataSettings
from graphoptd.data.shm import SharedMemory

CONNECTION_EXTENSION = "graphopt.connection"


class DataPlane:
    """The ASGI application.

    Args:
        directory: the models.
        settings: limits and switches.
        version: of this program, told in the server's metadata.
        loop: the event loop it will be called on.
        under_way: holds every call that is being answered.
    """

    def __init__(
        self,
        directory: Directory,
        settings: DataSettings,
        version: str,
        loop: asyncio.AbstractEventLoop,
        under_way: Sized,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._version = version
        self._loop = loop
        self.failures = Failures()
        self.budget = ByteBudget(settings.inflight_bytes_max)
        self.lanes = Lanes(directory, settings, loop, under_way)
        self._memory = (
            SharedMemory(settings.shared_memory_regions_max) if settings.shared_memory else None
        )
        # One thread each: decoding is bound by the GIL, and loads must follow each other.
        self._codec = ThreadPoolExecutor(1, "data-codec")
        self._control = ThreadPoolExecutor(1, "data-control")
        self._inference = Inference(self.lanes, settings, self._memory, self._codec)
        self._routes: dict[str, Callable[[Call], Awaitable[Answer]]] = {
            "server": self._server,
            "live": self._live,
            "ready": self._ready,
            "statistics": self._statistics,
            "model": self._model,
            "model_ready": self._model_ready,
            "model_config": self._model_config,
            "infer": self._inference.answer,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
            "shm_status": self._shm_status,
            "shm_register": self._shm_register,
            "shm_unregister": self._shm_unregister,
        }

    def close(self) -> None:
        """Release threads and shared memory; call when no request runs."""
        self._codec.shutdown(wait=False, cancel_futures=True)
        self._control.shutdown(wait=False, cancel_futures=True)
        if self._memory is not None:
            self._memory.unregister(None)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        lease = self.budget.lease()
        model = ""
        headers: dict[bytes, bytes] = {}
        call: Call | None = None
        connection = None
        try:
            headers = dict(scope["headers"])
            route = resolve(scope["method"], scope["raw_path"])
            model = route.model
            extensions = scope.get("extensions")
            connection = extensions.get(CONNECTION_EXTENSION) if extensions else None
            call = Call(route, headers, receive, lease, connection)
            answer = await self._routes[route.name](call)
        except ClientGoneError:
            return
        except GraphoptError as error:
            self.failures.add(model, error)
            answer = error_answer(error, self._settings.retry_after_s)
        except Exception as error:
            self.failures.add(model, error)
            answer = internal_answer()
        finally:
            lease.release()
        if b"expect" in headers and (call is None or not call.is_read):
            # The client waits for leave to send its body and will not get it; what it sends next is
            # unclear.
            answer.headers.append((b"connection", b"close"))
            connection = None
        answer.headers.append((b"content-length", b"%d" % answer.size_bytes()))
        if connection is not None and len(answer.parts) < 2:
            body = answer.parts[0] if answer.parts else b""
            if connection.answer_at_once(send, answer.status, answer.headers, body):
                return
        await _send(answer, send)

    # -- routes that read

    async def _server(self, _: Call) -> Answer:
        return describe.server_metadata(self._version, self._settings)

    async def _live(self, _: Call) -> Answer:
        return describe.live(self._directory)

    async def _ready(self, _: Call) -> Answer:
        return describe.ready(self._directory)

    async def _statistics(self, call: Call) -> Answer:
        lanes = describe.lanes_of(self.lanes, call.route.model)
        for lane in lanes:
            check_version(lane.served.name, call.route.version, lane.served.signature().revision)
        return describe.statistics(lanes)

    async def _model(self, call: Call) -> Answer:
        lane = self.lanes.get(call.route.model)
        check_version(lane.served.name, call.route.version, lane.served.signature().revision)
        return describe.model_metadata(lane)

    async def _model_ready(self, call: Call) -> Answer:
        return describe.model_ready(self._directory, call.route.model, call.route.version)

    async def _model_config(self, call: Call) -> Answer:
        lane = self.lanes.get(call.route.model)
        check_version(lane.served.name, call.route.version, lane.served.signature().revision)
        return describe.model_config(lane, self._settings)

    async def _index(self, call: Call) -> Answer:
        limit_bytes = self._settings.envelope_bytes_max
        body = await read_body(call, limit_bytes, self._codec)
        only_ready = repository.only_ready(repository.read_object(body, limit_bytes))
        return describe.repository_index(self._directory, only_ready)

    # -- routes that change

    async def _load(self, call: Call) -> Answer:
        repository.check_control(call, self._settings.repository_control, "repository_control")
        limit_bytes = self._settings.envelope_bytes_max
        body = await read_body(call, limit_bytes, self._codec)
        name = call.route.model
        bundle = repository.bundle_to_load(name, repository.read_object(body, limit_bytes))
        await self._loop.run_in_executor(self._control, self._directory.load, name, bundle)
        return _empty()

    async def _unload(self, call: Call) -> Answer:
        repository.check_control(call, self._settings.repository_control, "repository_control")
        limit_bytes = self._settings.envelope_bytes_max
        body = await read_body(call, limit_bytes, self._codec)
        # `unload_dependents` is accepted and means nothing: there are no ensembles.
        repository.parameters_of(repository.read_object(body, limit_bytes))
        await self._loop.run_in_executor(self._control, self._directory.unload, call.route.model)
        return _empty()

    async def _shm_status(self, call: Call) -> Answer:
        return json_answer(self._shared_memory().status(call.route.region))

    async def _shm_register(self, call: Call) -> Answer:
        repository.check_control(call, self._settings.shared_memory, "shared_memory")
        limit_bytes = self._settings.envelope_bytes_max
        body = await read_body(call, limit_bytes, self._codec)
        document = repository.read_object(body, limit_bytes)
        repository.register_region(self._shared_memory(), call.route.region or "", document)
        return _empty()

    async def _shm_unregister(self, call: Call) -> Answer:
        repository.check_control(call, self._settings.shared_memory, "shared_memory")
        await read_body(call, self._settings.envelope_bytes_max, self._codec)
        self._shared_memory().unregister(call.route.region)
        return _empty()

    def _shared_memory(self) -> SharedMemory:
        if self._memory is None:
            raise HttpError(403, "shared memory is off", remedy="set data.shared_memory")
        return self._memory


def _empty() -> Answer:
    """200 with an empty body, as the protocol wants it after a change; never 204."""
    return Answer(200, [JSON_TYPE], ())


async def _send(answer: Answer, send: Send) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    parts = answer.parts
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1] if parts else b""})
