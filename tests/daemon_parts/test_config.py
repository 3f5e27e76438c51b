"""The configuration file and the settings say the same; a bad file changes nothing."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from graphopt.documents import load_yaml
from graphopt.errors import DocumentError, LimitError
from graphoptd.config import compare, load, of_models, reload
from graphoptd.settings import LIVE, RESTART, STATE, ModelSettings, Settings

MANUAL = Path(__file__).parents[2] / "configs" / "graphoptd.yaml"


def keys_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to default, as a document would hold it."""
    found: dict[str, Any] = {}
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            found |= keys_of(value, f"{prefix}{each.name}.")
        elif isinstance(value, tuple):
            found[prefix + each.name] = list(value)
        elif isinstance(value, Mapping):
            found[prefix + each.name] = dict(value)
        else:
            found[prefix + each.name] = str(value) if isinstance(value, Path) else value
    return found


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, below in value.items():
        if isinstance(below, dict) and below:
            found |= flat(below, f"{prefix}{key}.")
        else:
            found[prefix + key] = below
    return found


def example_models(text: str) -> str:
    """The commented example at the end of the manual, uncommented."""
    lines = text.split("\nmodels: {}\n")[1].splitlines()
    return "\n".join(line.removeprefix("# ") for line in lines)


def written(folder: Path, text: str) -> Path:
    path = folder / "graphoptd.yaml"
    path.write_text(text)
    return path


def test_the_manual_holds_every_key_with_its_default_and_no_other() -> None:
    document = load_yaml(MANUAL.read_bytes())
    assert isinstance(document.value, dict)
    assert flat(document.value) == keys_of(Settings())
    assert load(MANUAL) == Settings()


def test_the_example_model_of_the_manual_holds_every_key_with_its_default(tmp_path: Path) -> None:
    text = example_models(MANUAL.read_text())
    document = load_yaml(text)
    assert isinstance(document.value, dict)
    example = ModelSettings(bundle=Path("/srv/models/minilm"))
    assert document.value == {"models": {"minilm": keys_of(example)}}
    assert load(written(tmp_path, text)).models["minilm"] == example


def test_the_manual_marks_every_key_with_what_a_reload_does() -> None:
    text = MANUAL.read_text()
    marks = {LIVE: text.count("[live]"), RESTART: text.count("[restart]")}
    # The introduction names each mark once; ring_lines_max and ring_bytes_max share one mark.
    leaves = [
        each.metadata["reload"]
        for section in (*_sections(Settings()), ModelSettings(bundle=Path("x")))
        for each in fields(section)
        if not is_dataclass(getattr(section, each.name))
    ]
    assert marks[LIVE] == leaves.count(LIVE) + 1 - 1
    assert marks[RESTART] == leaves.count(RESTART) + 1
    assert text.count("[state]") == leaves.count(STATE) + 1


def _sections(section: Any) -> list[Any]:
    below = [getattr(section, each.name) for each in fields(section)]
    return [section, *(deep for part in below if is_dataclass(part) for deep in _sections(part))]


def test_an_empty_mapping_takes_every_default(tmp_path: Path) -> None:
    assert load(written(tmp_path, "{}")) == Settings()


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n"])
def test_an_empty_file_is_refused_because_half_written_files_are_empty(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(DocumentError, match="the file is empty"):
        load(written(tmp_path, text))


def test_all_faults_of_a_file_are_named_at_once_with_line_and_remedy(tmp_path: Path) -> None:
    text = (
        "data:\n  prot: 80\n  batch_max: 0\n  repository_control: no\nmodels:\n"
        "  'a/b': {bundle: x, device: gpu}\n  c: {}\nlog: {level: verbose}\n"
    )
    path = written(tmp_path, text)
    with pytest.raises(DocumentError) as caught:
        load(path)
    assert [where for where, _ in caught.value.detail] == [
        "data.prot",
        "data.batch_max",
        "data.repository_control",
        "models['a/b']",
        "models['a/b'].device",
        "models.c",
        "log.level",
    ]
    assert caught.value.where == f"{path}:2:3 data.prot"
    assert "did you mean port" in str(caught.value)
    assert "write false" in str(caught.value)
    assert "one of: debug, info, warning, error" in str(caught.value)
    assert f"{path}:7:6 models.c: the key 'bundle' is missing" in str(caught.value)


def test_a_missing_file_is_a_typed_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"cannot be read: No such file .*check the path"):
        load(tmp_path / "none.yaml")


def test_a_huge_file_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "graphoptd.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(LimitError, match="more than"):
        load(path)


def test_relative_paths_count_from_the_folder_of_the_file(tmp_path: Path) -> None:
    text = (
        "state: {path: state}\ncontrol: {socket: run/c.sock}\nrepository: bundles\n"
        "models: {m: {bundle: m.bundle}}\n"
    )
    settings = load(written(tmp_path, text))
    assert settings.state.path == tmp_path / "state"
    assert settings.control.socket == tmp_path / "run" / "c.sock"
    assert settings.repository == tmp_path / "bundles"
    assert settings.models["m"].bundle == tmp_path / "m.bundle"
    assert settings.data.socket_path == Path("/run/graphoptd-data.sock")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data: {inflight_bytes_max: 1048576}", "below body_bytes_max"),
        ("data: {repository_control: true}", "repository names no folder"),
        ("data: {host: ''}", "does not match"),
        ("data: {port: 65536}", "at most 65535"),
        ("data: {port: '8080'}", "must be an integer or null"),
        ("state: {path: ''}", "an empty path"),
        ("executor: {threads: many}", "must be 'auto' or an integer"),
        ("executor: {threads: 0}", "at least 1"),
        ("control: {levels: {operate_groups: [true]}}", "must be a string or an integer"),
        ("data: {drain_s: .inf}", "not finite"),
        ("models: {m: {bundle: b, threads: many}}", "must be 'auto' or an integer"),
        ("models: {m: {bundle: b, threads: 0}}", "at least 1"),
        ("models: {m: {bundle: b, threads: 1025}}", "at most 1024"),
        ("models: {m: {bundle: b, prefer: speed}}", "'latency' or 'throughput' or null"),
        ("models: {m: {bundle: b, queue_max: 0}}", "at least 1"),
        ("models: {m: {bundle: b, queue_max: auto}}", "must be an integer or null"),
        ("models: {m: {bundle: b, memory_bytes_max: -1}}", "at least 0"),
        ("models: {m: {bundle: b, memory_bytes_max: 1.5}}", "must be an integer or null"),
        ("models: {m: {bundle: b, memory_max: 1}}", "did you mean memory_bytes_max"),
        ("data: []", "must be a mapping, not a list"),
        ("models: []", "must be a mapping, not a list"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason):
        load(written(tmp_path, text))


def test_a_reload_applies_live_keys_and_lists_the_others(tmp_path: Path) -> None:
    path = written(tmp_path, "models: {m: {bundle: a}, gone: {bundle: g}}")
    running = load(path)
    path.write_text(
        "log: {level: debug}\ndata: {port: 9000}\nspool: {kept_max: 7}\n"
        "control: {levels: {admin_users: [alice, 1000]}}\n"
        "models: {m: {bundle: b, device: cpu}, new: {bundle: n}}\n"
    )
    done = reload(path, running)
    assert done.live == (
        "control.levels.admin_users",
        "spool.kept_max",
        "log.level",
        "models.new",
    )
    assert done.restart == ("data.port", "models.m.device")
    assert done.state == ("models.m.bundle", "models.gone")
    assert done.settings.data.port == 8080
    assert done.settings.spool.kept_max == 7
    assert done.settings.control.levels.admin_users == ("alice", 1000)
    assert done.settings.models["m"].device == "auto"
    assert done.settings.models["m"].bundle == tmp_path / "a"
    assert done.settings.models["new"].bundle == tmp_path / "n"
    again = reload(path, done.settings)
    assert again.live == ()
    assert again.restart == done.restart
    assert again.state == done.state


def test_what_a_model_may_have_is_read_with_its_name(tmp_path: Path) -> None:
    text = (
        "models:\n  m: {bundle: a, prefer: throughput, threads: 3, queue_max: 7, "
        "memory_bytes_max: 1000}\n  n: {bundle: b, threads: auto, prefer: null}\n"
    )
    settings = load(written(tmp_path, text))
    assert settings.models["m"] == ModelSettings(
        tmp_path / "a", "auto", "throughput", 3, 7, memory_bytes_max=1000
    )
    assert settings.models["n"] == ModelSettings(tmp_path / "b")
    assert [settings.queue_max(name) for name in ("m", "n", "loaded since")] == [7, None, None]


def test_a_reload_names_what_a_model_gets_at_the_next_start_also_one_it_adds(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, "models: {m: {bundle: a, queue_max: 5}}")
    running = load(path)
    path.write_text(
        "models: {m: {bundle: a, threads: 2, prefer: latency, memory_bytes_max: 0}, "
        "new: {bundle: n, queue_max: 1}}"
    )
    done = reload(path, running)
    assert done.live == ("models.new",)
    assert done.restart == (
        "models.m.prefer", "models.m.threads", "models.m.queue_max", "models.m.memory_bytes_max",
        "models.new.queue_max",
    )  # fmt: skip
    assert done.settings.models["m"] == running.models["m"]
    assert done.settings.models["new"] == ModelSettings(tmp_path / "n")
    assert reload(path, done.settings).restart == done.restart, "said until it is restarted"


def test_a_reload_of_an_unchanged_file_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "models: {m: {bundle: a}}")
    running = load(path)
    done = reload(path, running)
    assert (done.live, done.restart, done.state) == ((), (), ())
    assert done.settings == running


def test_a_bad_reload_raises_and_leaves_the_running_settings(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {queue_max: 5}")
    running = load(path)
    path.write_text("data: {queue_max: 6}\nlog: {level: loud}\n")
    with pytest.raises(DocumentError, match="loud"):
        reload(path, running)
    assert running.data.queue_max == 5


def test_every_key_says_what_a_reload_does() -> None:
    for section in (*_sections(Settings()), ModelSettings(bundle=Path("x"))):
        for each in fields(section):
            assert each.metadata["reload"] in (LIVE, RESTART, STATE), each.name


def test_models_on_the_command_line_become_settings(tmp_path: Path) -> None:
    settings = of_models([f"a={tmp_path}/a", "b=b=c"])
    assert settings.models["a"].bundle == tmp_path / "a"
    assert settings.models["b"].bundle == Path("b=c").absolute()
    assert compare(Settings(), settings).live == ("models.a", "models.b")


@pytest.mark.parametrize("argument", ["a", "=x", "a=", "a/b=x", "../a=x"])
def test_a_wrong_model_argument_is_refused(argument: str) -> None:
    with pytest.raises(DocumentError, match="--model"):
        of_models([argument])


def test_a_model_named_twice_on_the_command_line_is_refused() -> None:
    with pytest.raises(DocumentError, match="named twice"):
        of_models(["a=x", "a=y"])
