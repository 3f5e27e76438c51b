"""The path of an inference request: read, decode, queue, run, encode.

Work that would hold the event loop for more than about a millisecond (large JSON, compression,
shared memory) goes to the codec thread; the common case, a small binary request, never leaves the
loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import TypeVar, TypeVarTuple

from graphoptd.data.answers import ClientGoneError
from graphoptd.data.batcher import Outcome, Work
from graphoptd.data.body import Call, read_body
from graphoptd.data.compression import wished_coding
from graphoptd.data.decode import InferRequest, Interface, decode
from graphoptd.data.encode import Answer, compress, encode, is_heavy
from graphoptd.data.lanes import Lane, Lanes, check_version
from graphoptd.data.settings import DataSettings
from graphoptd.data.shm import SharedMemory
from graphoptd.data.tensors import Body

_DECODE_HERE_BYTES = 32 << 10  # JSON of this size decodes in 0.2 to 0.4 ms

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


class Inference:
    """Answers `POST /v2/models/{model}[/versions/{version}]/infer`."""

    def __init__(
        self,
        lanes: Lanes,
        settings: DataSettings,
        memory: SharedMemory | None,
        codec: ThreadPoolExecutor,
    ) -> None:
        self._lanes = lanes
        self._settings = settings
        self._memory = memory
        self._codec = codec

    async def answer(self, call: Call) -> Answer:
        """The answer to one request.

        Raises:
            GraphoptError: a refusal; see `answers` for its status.
            ClientGoneError: the client closed; its work was withdrawn.
        """
        lane = self._lanes.get(call.route.model)
        interface = lane.interface()
        check_version(lane.served.name, call.route.version, interface.signature.revision)
        content = await read_body(call, self._settings.body_bytes_max, self._codec)
        started_ns = perf_counter_ns()
        try:
            return await self._run(call, lane, interface, content, started_ns)
        except Exception as error:
            if not isinstance(error, ClientGoneError):
                lane.statistics.add_failure(perf_counter_ns() - started_ns)
            raise

    async def _run(
        self, call: Call, lane: Lane, interface: Interface, content: bytes, started_ns: int
    ) -> Answer:
        settings, memory = self._settings, self._memory
        body = Body(content, call.headers.get(b"inference-header-content-length"))
        how = (body, interface, settings.envelope_bytes_max, memory, call.lease)
        if len(body.json) > _DECODE_HERE_BYTES or (
            memory is not None and b"shared_memory" in body.json
        ):
            request = await self._elsewhere(decode, *how)
        else:
            request = decode(*how)
        decoded_ns = perf_counter_ns()
        outcome = await self._compute(call, lane, request)
        computed_ns = perf_counter_ns()
        # A delta may have gone live since the check; then this is not the version asked for.
        check_version(lane.served.name, call.route.version, outcome.revision)
        wish = call.headers.get(b"accept-encoding")
        coding = wished_coding(wish) if wish else None
        if is_heavy(request.outputs, outcome.outputs, coding):
            answer = await self._elsewhere(self._encode, lane, request, outcome, coding)
        else:
            answer = self._encode(lane, request, outcome, coding)
        done_ns = perf_counter_ns()
        lane.statistics.add_success(
            request.rows,
            done_ns - started_ns,
            outcome.queue_ns,
            decoded_ns - started_ns + outcome.input_ns,
            outcome.infer_ns,
            done_ns - computed_ns,
        )
        return answer

    def _elsewhere(self, work: Callable[[*_Args], _T], *args: *_Args) -> asyncio.Future[_T]:
        """Do it on the codec thread."""
        return asyncio.get_running_loop().run_in_executor(self._codec, work, *args)

    async def _compute(self, call: Call, lane: Lane, request: InferRequest) -> Outcome:
        settings = self._settings
        deadline_s = settings.deadline_default_s
        if request.timeout_us:
            deadline_s = min(request.timeout_us / 1e6, settings.deadline_max_s)
        work = Work(request.inputs, request.rows, request.batch_key, request.size_bytes)
        future = lane.batcher.enqueue(work, deadline_s)
        if future.done():
            return future.result()
        connection = call.connection
        if connection is None:
            return await future
        connection.on_lost = future.cancel
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ClientGoneError from None
        finally:
            connection.on_lost = None

    def _encode(
        self, lane: Lane, request: InferRequest, outcome: Outcome, coding: bytes | None
    ) -> Answer:
        answer = encode(
            lane.served.name,
            request,
            outcome.outputs,
            outcome.revision,
            outcome.plan_id,
            self._memory,
        )
        return compress(answer, coding) if coding else answer
