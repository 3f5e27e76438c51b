"""The parts of a running service, put together and taken apart in order.

    start   take the addresses -> recover the state -> load new models -> run each once -> listen
    stop    stop listening and drain -> stop the helpers -> close the state

Addresses are taken first, because a busy one is the commonest mistake and recovery may take long;
nobody is let in before every model has answered a request of ours. When `stop` was given time, every
request that was accepted is answered.

Deliberately absent: signals, systemd and exit codes (`graphoptd.service`).
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import graphopt
from cost_models.coefficients import operator_files
from cost_models.host_model import HostModel, calibration_path
from graphopt.engine import EngineSettings, Host, LiveModel, ModelLimits
from graphopt.engine.records import EventSink
from graphopt.errors import GraphoptError
from graphopt.executor.samples import sample_inputs
from graphoptd import config
from graphoptd.configured import ConfiguredModels
from graphoptd.control import ControlContext, ControlServer
from graphoptd.control.changes import apply_to
from graphoptd.control.context import origin
from graphoptd.data import DataServer, DataSettings
from graphoptd.data.sockets import open_tcp, open_unix, unlink_own
from graphoptd.directory import HostDirectory, figures_of
from graphoptd.engine_events import EngineEvents
from graphoptd.events import FailureCounter, emit
from graphoptd.logs import Logs
from graphoptd.no_dynamo import spare_dynamo
from graphoptd.settings import Settings
from graphoptd.spool import Spool
from graphoptd.systemd import Inherited

COEFFICIENTS_NAMED_MAX = 16  # of a reload; a calibration changes hundreds


class App:
    """Everything but the process.

    Args:
        settings: in force from the start; a reload replaces them.
        strict: whether a configured model that cannot be loaded ends the start.
        logs: installed already.
        inherited: sockets from systemd, which replace those of the settings.
        reload: what the control plane calls for a reload.
        store_failed: called, on any thread, when the state can take no more writes.
    """

    host: Host
    costs: HostModel
    data: DataServer
    control: ControlServer

    def __init__(
        self,
        settings: Settings,
        strict: bool,
        logs: Logs,
        inherited: Inherited,
        reload: Callable[[], Any],
        store_failed: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.failures = FailureCounter(time.monotonic, settings.log.failures_period_s)
        self._strict = strict
        self._logs = logs
        self._inherited = inherited
        self._reload = reload
        self._store_failed = store_failed
        self._own: list[socket.socket] = []
        self._own_path: tuple[str, int] | None = None
        self._spool: Spool | None = None
        self._started_s = time.time()
        self.doors_closed = asyncio.Event()

    async def start(self) -> None:
        """Serve. Raises GraphoptError; what had been started then waits for `stop`."""
        self._take_addresses()
        await _on_own_thread(self._recover)
        await self._load_configured()
        await self._run_each_model()
        await self._listen()
        self.directory.open()

    async def stop(self, drain_s: float) -> int:
        """Let nobody in, drain for up to `drain_s` seconds, close; how many requests were cut off."""
        planes = asyncio.gather(self._stop_data(drain_s), self._stop_control(drain_s))
        await asyncio.sleep(0)  # both planes close their listeners before they first wait
        self._give_addresses_back()
        self.doors_closed.set()
        if self._spool is not None:
            await asyncio.to_thread(self._spool.stop)
        aborted, _ = await planes
        self.tell_failures(now=True)
        if hasattr(self, "host"):
            await asyncio.to_thread(self.host.close)
        return aborted

    async def cut(self) -> int:
        """Stop without waiting, for whoever asked twice; how many requests were cut off."""
        return await self.stop(0.0)

    async def _stop_data(self, drain_s: float) -> int:
        return (await self.data.stop(drain_s)).n_aborted if hasattr(self, "data") else 0

    async def _stop_control(self, drain_s: float) -> None:
        if hasattr(self, "control"):
            await self.control.stop(drain_s)

    # -- start

    def _take_addresses(self) -> None:
        if self._inherited.data:
            return
        data = self.settings.data
        if data.port is not None:
            self._own.append(open_tcp(data.host, data.port))
        if data.socket_path is not None:
            path = os.fspath(data.socket_path)
            _make_folder(data.socket_path)
            self._own.append(open_unix(path, data.socket_mode))
            self._own_path = (path, os.stat(path).st_ino)

    def _recover(self) -> None:
        start_s = time.monotonic()
        spare_dynamo()
        events = EngineEvents(origin, self._store_failed)
        state = self.settings.state.path
        settings = engine_settings(self.settings, events)
        costs = self.costs = HostModel(calibration_path(state), self.settings.costs.path)
        self.host = Host(settings, state, cost_model=costs)
        self.directory = HostDirectory(
            self.host, lambda: self.settings.repository, lambda name: self.settings.queue_max(name)
        )
        self.configured = ConfiguredModels(self.host, state)
        models = self.host.models().values()
        emit(
            "daemon.recovered",
            models=len(models),
            deltas=sum(model.revision - 1 for model in models),
            duration_ms=_ms_since(start_s),
            path=str(state),
        )

    async def _load_configured(self) -> None:
        for name in self.configured.wanted(self.settings):
            try:
                graph = await asyncio.to_thread(self.configured.read, self.settings, name)
                await asyncio.to_thread(self.configured.load, name, graph)
            except GraphoptError as error:
                if self._strict:
                    raise
                self._refuse_model(name, error)
        self.configured.note()

    def _refuse_model(self, name: str, error: GraphoptError) -> None:
        emit(
            "model.refused",
            graph=name,
            code=error.code,
            message=error.message,
            where=error.where or None,
            remedy=error.remedy or None,
            detail=[list(each) for each in error.detail] or None,
            source="config",
            path=str(self.settings.models[name].bundle),
        )

    async def _run_each_model(self) -> None:
        """The proof that each model serves, and the first touch of its memory."""
        for model in self.host.models().values():
            with suppress(GraphoptError):  # inputs made up may be none the model can take
                await asyncio.wrap_future(self.host.submit(model, sample_inputs(model.facts)))

    async def _listen(self) -> None:
        self.data = DataServer(self.directory, DataSettings(**asdict(self.settings.data)))
        await self.data.start(self._inherited.data or self._own)
        emit(
            "daemon.listening",
            plane="data",
            addresses=self.data.addresses,
            inherited=bool(self._inherited.data),
        )
        context = ControlContext(
            host=self.host,
            settings=lambda: self.settings,
            ring=self._logs.ring,
            reload=self._reload,
            version=graphopt.__version__,
            started_s=self._started_s,
            statistics=self.statistics,
        )
        self.control = ControlServer(context)
        await self.control.start(self._inherited.control)
        if self.settings.spool.path is not None:
            self._spool = Spool(lambda: self.settings, partial(apply_to, self.host))
            missing = await asyncio.to_thread(self._spool.start)
            if missing:
                emit("limit.reached", limit="notifications of the spool", bound=0, reason=missing)

    def _give_addresses_back(self) -> None:
        for each in self._own:
            each.close()
        if self._own_path is not None:
            unlink_own(*self._own_path)
        self._own_path = None

    # -- while it runs

    async def take_over(self, path: Path) -> config.Reload:
        """Take over the configuration at `path`, whole or not at all.

        Raises:
            GraphoptError: the file, or a bundle that it adds, is no good; nothing has changed.
        """
        found = await asyncio.to_thread(config.reload, path, self.settings)
        folder = found.settings.costs.path
        layers = await asyncio.to_thread(self.costs.read, folder)
        names = self.configured.wanted(found.settings)
        graphs = {
            name: await asyncio.to_thread(self.configured.read, found.settings, name)
            for name in names
        }
        for name, graph in graphs.items():
            await asyncio.to_thread(self.configured.load, name, graph)
        repriced = await asyncio.to_thread(self.costs.take, layers, folder)
        self.settings = found.settings
        self._logs.configure(found.settings.log)
        self.failures.period_s = found.settings.log.failures_period_s
        ignored = tuple(
            key
            for key in found.live
            if key.startswith("models.") and key.removeprefix("models.") not in names
        )
        live = tuple(key for key in found.live if key not in ignored) + _cost_keys(repriced)
        return replace(found, live=live, state=(*found.state, *ignored))

    def cost_files(self) -> tuple[Path, ...]:
        """The files that the cost model is made of, or would be if they were there."""
        if not hasattr(self, "costs"):
            return ()
        # Without its folder, which a first calibration makes: that one tells the service by itself
        found = [calibration_path(self.settings.state.path)]
        folder = self.settings.costs.path
        if folder is not None:
            with suppress(GraphoptError):  # a reload says so
                found += operator_files(folder)
            found.append(folder)  # its own time stamp tells of files that come and go
        return tuple(found)

    def statistics(self) -> Mapping[str, Any]:
        """Figures of the data plane by model, for `status` and `top`."""
        if not hasattr(self, "data"):
            return {}
        return {lane.served.name: figures_of(lane) for lane in self.data.plane.lanes.all()}

    def is_idle(self) -> bool:
        """Whether no request runs now."""
        return not any(model.slot.is_busy() for model in self.host.models().values())

    def tell_failures(self, now: bool = False) -> None:
        """Count what failed since the last call; say it when the period is over, or now."""
        if hasattr(self, "data"):
            for failure in self.data.take_failures():
                self.failures.add(failure.model, failure.code, failure.text, failure.count)
        if now:
            self.failures.flush()
        else:
            self.failures.tick()

    def tend(self) -> None:
        """What is due every second or so."""
        self.tell_failures()
        self.configured.note()

    def models(self) -> Mapping[str, LiveModel]:
        """The live models."""
        return self.host.models() if hasattr(self, "host") else {}


def engine_settings(settings: Settings, events: EventSink) -> EngineSettings:
    """What the configuration tells the engine."""
    executor, builder = settings.executor, settings.builder
    threads = executor.budget()
    limits = {
        name: ModelLimits(executor.budget_of(model), model.memory_bytes_max)
        for name, model in settings.models.items()
    }
    return EngineSettings(
        threads.workers, threads.each, builder=builder.enabled,
        builder_floor_pct=builder.floor_pct, artifacts_bytes_max=builder.artifacts_bytes_max,
        events=events, models=limits,
    )  # fmt: skip


def _cost_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Coefficients as a reload lists them: the first ones, and how many more."""
    listed = tuple(f"costs: {name}" for name in names[:COEFFICIENTS_NAMED_MAX])
    more = len(names) - len(listed)
    return (*listed, f"costs: and {more} more") if more else listed


async def _on_own_thread(work: Callable[[], None]) -> None:
    """Run `work` on a thread that nobody joins: a stop during a long recovery need not wait for it."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    Thread(target=run, name="graphoptd-recovery", daemon=True).start()
    # Shielded: to cancel the wait must not cancel a future that `run` will set.
    await asyncio.shield(asyncio.wrap_future(done))


def _make_folder(socket_path: Path) -> None:
    """The folder of a socket, as `./run/`; an error shows when the socket is bound."""
    with suppress(OSError):
        socket_path.parent.mkdir(parents=True, exist_ok=True)


def _ms_since(start_s: float) -> float:
    return round((time.monotonic() - start_s) * 1e3, 1)
