"""A lane is all that the data plane keeps for one live model: its queue, its counters, its checked interface.

Lanes follow the directory: a model that is replaced under the same name gets a fresh lane, and the
old one drains by itself while requests hold it.
"""

import asyncio
from collections.abc import Sized

from graphopt.errors import GraphoptError, ModelNotFoundError, nearest
from graphoptd.data.batcher import Batcher
from graphoptd.data.decode import Interface
from graphoptd.data.served import Directory, Served
from graphoptd.data.settings import DataSettings
from graphoptd.data.statistics import ModelStatistics


class VersionNotFoundError(GraphoptError):
    """The version in the URL is not the current revision."""

    code = "model.version_gone"


class Lane:
    """One live model, as requests see it."""

    __slots__ = ("_interface", "batcher", "served", "statistics")

    def __init__(
        self,
        served: Served,
        settings: DataSettings,
        loop: asyncio.AbstractEventLoop,
        under_way: Sized,
    ) -> None:
        self.served = served
        self.statistics = ModelStatistics()
        self.batcher = Batcher(served, settings, self.statistics, loop, under_way)
        self._interface = Interface.of(served.signature())

    def interface(self) -> Interface:
        """The current revision's, indexed again only when the signature object changed."""
        signature = self.served.signature()
        if signature is not self._interface.signature:
            self._interface = Interface.of(signature)
        return self._interface


class Lanes:
    """The lanes of all live models; `under_way` holds every request that is being answered."""

    def __init__(
        self,
        directory: Directory,
        settings: DataSettings,
        loop: asyncio.AbstractEventLoop,
        under_way: Sized,
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._loop = loop
        self._under_way = under_way
        self._by_name: dict[str, Lane] = {}

    def get(self, name: str) -> Lane:
        """The lane of a live model; raises ModelNotFoundError."""
        served = self._directory.find(name)
        lane = self._by_name.get(name)
        if served is None:
            self._by_name.pop(name, None)
            names = [entry.name for entry in self._directory.index()]
            raise ModelNotFoundError(
                f"no model {name!r} is loaded",
                where="model",
                remedy=nearest(name, names) or "list models with POST /v2/repository/index",
            )
        if lane is None or lane.served is not served:
            lane = self._by_name[name] = Lane(served, self._settings, self._loop, self._under_way)
        return lane

    def all(self) -> list[Lane]:
        """The lanes of every live model, in the directory's order."""
        live = [
            entry.name
            for entry in self._directory.index()
            if self._directory.find(entry.name) is not None
        ]
        for name in self._by_name.keys() - set(live):
            del self._by_name[name]
        return [self.get(name) for name in live]


def check_version(name: str, version: str | None, revision: int) -> None:
    """Nothing when the URL names no version or the current one; else raises VersionNotFoundError."""
    if version is not None and version != str(revision):
        raise VersionNotFoundError(
            f"version {version[:32]!r} does not serve; the current one is {revision}",
            where=f"model {name}",
            remedy=f"use /v2/models/{name}/versions/{revision}, or leave the version out",
        )
