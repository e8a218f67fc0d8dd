"""Run files: what is accepted, and that what is wrong is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from disthess import config
from disthess.errors import ConfigError

MINIMAL = {"problem": {"factory": "a:b"}, "compute": {"store": "s.zarr"}}
ROOT = Path(__file__).parents[3]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_only_factory_and_store_are_required() -> None:
    parsed = config.parse(MINIMAL, "here")
    assert parsed.compute.parts == ["hessian"]
    assert parsed.report.eigenvalues == 10


def test_every_config_in_the_repository_is_valid() -> None:
    found = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.endswith("_audit"))
    assert found
    for path in found:
        assert config.load(path).compute.store.endswith(".zarr")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({**MINIMAL, "compute": {"store": "s", "wokers": 2}}, ["'wokers'", "section compute", "workers", "threads"]),
        ({**MINIMAL, "raport": {}}, ["'raport'", "top level", "did you mean report"]),
        (
            {**MINIMAL, "problem": {"factory": "a:b", "checkpoint": {"path": "x", "format": "torch", "perfix": ""}}},
            ["'perfix'", "section problem.checkpoint", "prefix"],
        ),
        ({**MINIMAL, "compute": {"store": "s", "threads": "two"}}, ["compute.threads", "'two'", "integer"]),
        ({**MINIMAL, "compute": {"store": "s", "workers": 0}}, ["compute.workers", "0"]),
        ({**MINIMAL, "compute": {"store": "s", "parts": ["hesian"]}}, ["compute.parts", "'hesian'", "'ggn'"]),
        ({**MINIMAL, "compute": {"store": "s", "parts": []}}, ["compute.parts"]),
        ({**MINIMAL, "compute": {"store": "s", "dtype": "float16"}}, ["compute.dtype", "float16", "float64"]),
        ({**MINIMAL, "report": {"density": "yes please"}}, ["report.density"]),
        ({"problem": {"factory": "a:b"}}, ["'compute'", "missing"]),
        ([1, 2], ["list", "compute"]),
        (None, ["nothing", "problem"]),
    ],
)
def test_what_is_wrong_is_named(tree: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(tree, "run.yaml")
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    for word in ["run.yaml", *words]:
        assert word in message


def test_a_repeated_key_is_an_error_not_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "problem: {factory: a:b}\ncompute:\n  store: one\n  store: two\n")
    with pytest.raises(ConfigError, match=r"'store' is given twice at line 4"):
        config.load(path)


def test_yaml_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not YAML.*line 2"):
        config.load(write(tmp_path, "problem:\n  - a: b: c\n"))


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(write(tmp_path, "problem: !!python/object/apply:os.getcwd []\n"))


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="run file"):
        config.load(tmp_path / name)


def test_overrides_replace_only_what_is_given_and_are_checked() -> None:
    parsed = config.parse({**MINIMAL, "compute": {"store": "s", "workers": 3}}, "here")
    changed = parsed.with_overrides(executor="ray", workers=None, store="t")
    assert (changed.compute.executor, changed.compute.workers, changed.compute.store) == ("ray", 3, "t")
    with pytest.raises(ConfigError, match="command line"):
        parsed.with_overrides(threads=0)


def test_memory_is_gib_in_the_file_and_bytes_in_the_call() -> None:
    parsed = config.parse({**MINIMAL, "compute": {"store": "s", "memory_gib": 1.5}}, "here")
    assert parsed.compute_options()["memory_bytes"] == 3 * 2**29


def test_a_config_survives_being_written_and_read() -> None:
    parsed = config.load(ROOT / "configs" / "digits_mlp_2ray.yaml")
    assert config.parse(yaml.safe_load(yaml.safe_dump(parsed.model_dump())), "copy") == parsed
