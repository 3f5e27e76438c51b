"""The data section of the configuration and the data plane's own settings do not drift apart."""

from dataclasses import fields, replace

from graphoptd.data.settings import DataSettings as PlaneSettings
from graphoptd.settings import DataSettings


def test_the_data_section_becomes_the_data_planes_own_settings() -> None:
    section = DataSettings()
    values = {each.name: getattr(section, each.name) for each in fields(section)}
    own = PlaneSettings(**values)
    # The plane serves no Unix socket by itself; the service does, beside its control socket.
    assert replace(own, socket_path=None) == PlaneSettings()
    assert [each.name for each in fields(own)] == list(values)
