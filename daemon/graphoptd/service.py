"""The process: start, serve, stop, and what the outside tells it meanwhile.

    run      start -> serve until told to stop -> stop
    signals  handlers only set flags; the first SIGTERM or SIGINT drains, the second cuts off, and the
             one that was caught is raised again at the end, so that the parent sees the true cause
    systemd  READY once every model has answered, STATUS, STOPPING, more time while the journal is
             recovered, and WATCHDOG only after a proof that the service serves

The proof goes the way of a request: the loop that carries control and data planes runs this code,
an executor thread answers an empty call, and the background gets to the end of its queue. A part that
stays silent is named in `daemon.stalled`, and the pings stop.
"""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import graphopt
from graphopt.errors import DocumentError, GraphoptError, StateFailedError
from graphoptd.app import App
from graphoptd.config import Reload
from graphoptd.events import emit, error_fields
from graphoptd.garbage import Garbage
from graphoptd.logs import Logs
from graphoptd.proofs import Proof, proofs_of
from graphoptd.settings import Settings
from graphoptd.systemd import Inherited
from graphoptd.watch import Watch

# The default of 5 ms lets one thread of Python hold up all others so long. Under 50 deltas a second and
# four clients, 0.5 ms answered 1.7 times as many requests as 5 ms (benchmarks/README.md); 0.1 ms fewer.
SWITCH_INTERVAL_S = 0.0005
TICK_S = 1.0  # counting failures, collecting garbage, looking at the store
RECOVERY_PING_S = 5.0  # while the journal is recovered
RECOVERY_TIME_S = 60.0  # asked for with each of those pings

EXIT_OK, EXIT_FAILED, EXIT_STATE, EXIT_STORE, EXIT_CONFIG = 0, 1, 65, 74, 78  # sysexits.h


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: the exit status, or the signal to die of."""

    status: int
    signal: Signals | None = None


class Service:
    """One run of graphoptd.

    Args:
        settings: of the first start.
        path: the configuration file, None when the command line is the configuration.
        logs: installed already.
        inherited: what systemd handed over.
        when_ready: text for people, written among the lines of the log once every model serves.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path | None,
        logs: Logs,
        inherited: Inherited,
        when_ready: str = "",
    ) -> None:
        self._path = path
        self._inherited = inherited
        self._notifier = inherited.notifier
        self._logs = logs
        self._when_ready = when_ready
        self._app = App(settings, path is None, logs, inherited, self.reload, self._on_store_failed)
        self._caught: list[signal.Signals] = []
        self._wants_reload = False
        self._wake = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._garbage = Garbage()
        self._watch: Watch | None = None
        self._proofs: list[Proof] = []
        self._told = ""  # the last STATUS
        # systemd asks for a ping in half its limit; one that is late by a tick must do.
        self._tick_s = min(TICK_S, (inherited.ping_period_s or TICK_S) / 2)
        self._started_s = time.monotonic()
        self._loop: asyncio.AbstractEventLoop

    async def run(self) -> Outcome:
        """The whole story. Raises GraphoptError when it cannot start; everything is closed then."""
        self._loop = asyncio.get_running_loop()
        self._catch_signals()
        try:
            started = await self._start()
        except BaseException:
            await self._app.stop(0.0)
            raise
        if started:
            await self._serve()
        return await self._stop()

    async def reload(self) -> Reload:
        """Take over the configuration file. Raises GraphoptError; the old one stays in force then."""
        async with self._reloading:
            if self._path is None:
                raise DocumentError(
                    "the service was started without a configuration file",
                    where="--model",
                    remedy="start it with --config FILE, or use graphoptctl load",
                )
            start_s = time.monotonic()
            self._notifier.reloading()
            try:
                done = await self._app.take_over(self._path)
            except GraphoptError as error:
                emit("config.rejected", path=str(self._path), **error_fields(error))
                raise
            finally:
                self._notifier.ready(self._status())
            emit(
                "config.reloaded",
                path=str(self._path),
                applied=list(done.live),
                needs_restart=list(done.restart),
                kept_by_state=list(done.state) or None,
                duration_ms=_ms_since(start_s),
            )
            return done

    # -- start, serve, stop

    async def _start(self) -> bool:
        """False when a signal came before everything was up."""
        emit(
            "daemon.starting",
            version=graphopt.__version__,
            pid=os.getpid(),
            path=str(self._path) if self._path else None,
        )
        for name, reason in self._inherited.refused:
            emit("limit.reached", limit=f"socket {name}", bound=0, reason=reason)
        self._notifier.status("recovering the state")
        starting = asyncio.ensure_future(self._app.start())
        while not starting.done():
            self._notifier.extend_timeout(RECOVERY_TIME_S)
            waking = asyncio.ensure_future(self._wake.wait())
            await asyncio.wait(
                {starting, waking}, timeout=RECOVERY_PING_S, return_when=asyncio.FIRST_COMPLETED
            )
            waking.cancel()
            if self._caught and not starting.done():
                starting.cancel()
        if starting.cancelled():
            return False
        starting.result()
        self._begin()
        return True

    def _begin(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._proofs = proofs_of(self._app.host)
        if self._path is not None:
            path, app = self._path, self._app
            self._watch = Watch(lambda: (path, *app.cost_files()), self._on_change)
            self._watch.start()
        self._garbage.begin()
        self._notifier.ready(self._status())
        emit("daemon.ready", models=len(self._app.models()), duration_ms=_ms_since(self._started_s))
        if self._when_ready:
            self._logs.say(self._when_ready)

    async def _serve(self) -> None:
        while not self._caught and not self._store_reason():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s):
                    await self._wake.wait()
            self._wake.clear()
            if self._wants_reload:
                self._wants_reload = False
                with suppress(GraphoptError):  # it is in the log
                    await self.reload()
            self._app.tend()
            self._garbage.tick(self._app.is_idle())
            self._prove()

    async def _stop(self) -> Outcome:
        start_s = time.monotonic()
        caught = self._caught[0] if self._caught else None
        reason = self._store_reason() or (f"signal {caught.name}" if caught else "")
        if self._store_reason():
            emit(
                "daemon.failed",
                code=StateFailedError.code,
                message=self._store_reason(),
                remedy="see to the disk and start again: what was acknowledged is there",
                exit_code=EXIT_STORE,
            )
        draining = asyncio.ensure_future(self._app.stop(self._app.settings.data.drain_s))
        await self._app.doors_closed.wait()
        emit("daemon.stopping", reason=reason, signal=caught.name if caught else None)
        self._notifier.stopping(f"draining: {reason}")
        if self._watch is not None:
            await asyncio.to_thread(self._watch.stop)
        aborted = await self._drained(draining)
        emit(
            "daemon.stopped",
            clean=aborted == 0,
            duration_ms=_ms_since(start_s),
            requests_cancelled=aborted or None,
        )
        if self._store_reason():
            return Outcome(EXIT_STORE)
        return Outcome(EXIT_OK, caught)

    async def _drained(self, draining: "asyncio.Future[int]") -> int:
        """Requests that were cut off; a second signal cuts off those that are left."""
        while not draining.done():
            if len(self._caught) > 1:
                draining.cancel()
                await asyncio.wait({draining})
                return await self._app.cut()
            self._wake.clear()
            waking = asyncio.ensure_future(self._wake.wait())
            either: list[asyncio.Future[Any]] = [draining, waking]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            waking.cancel()
        return draining.result()

    # -- what comes from outside: flags only

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_signal(self, number: signal.Signals) -> None:
        self._caught.append(number)
        self._wake.set()

    def _on_hangup(self) -> None:
        self._wants_reload = True
        self._wake.set()

    def _on_change(self, paths: tuple[Path, ...]) -> None:
        """On the watch's thread."""
        with suppress(RuntimeError):  # the loop is closed: too late to matter
            self._loop.call_soon_threadsafe(self._on_hangup)

    def _on_store_failed(self) -> None:
        """On the thread of the delta that failed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)

    def _store_reason(self) -> str:
        folder = self._app.host.folder if hasattr(self._app, "host") else None
        return folder.health.reason if folder is not None else ""

    # -- proof and status

    def _prove(self) -> None:
        """Ask each part again; ping and tell the status."""
        now_s = time.monotonic()
        stalled = [proof for proof in self._proofs if not proof.holds(now_s)]
        for proof in stalled:
            if not proof.told:
                emit("daemon.stalled", reason=proof.name, silent_s=round(proof.silent_s(now_s), 1))
                proof.told = True
        if self._inherited.watchdog_s is not None and not stalled:
            self._notifier.watchdog()
        status = f"stalled: {stalled[0].name}" if stalled else self._status()
        if status != self._told:
            self._notifier.status(status)
            self._told = status

    def _status(self) -> str:
        models = self._app.models()
        shown = ", ".join(f"{name} revision {models[name].revision}" for name in sorted(models)[:8])
        more = f" and {len(models) - 8} more" if len(models) > 8 else ""
        return f"serving {shown}{more}" if models else "serving no model yet"


def _ms_since(start_s: float) -> float:
    return round((time.monotonic() - start_s) * 1e3, 1)
