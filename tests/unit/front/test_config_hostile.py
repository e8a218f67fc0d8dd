"""Run files that nobody meant: only a ConfigError comes out, soon and without much memory; checkpoints never run code."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disthess.config import RunConfig, load
from disthess.errors import ConfigError
from disthess.loading import Checkpoint, load_checkpoint

GOOD = "problem: {factory: 'a:b'}\ncompute: {store: s.zarr}\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        MERGES,
        GOOD + "problem2:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
        "a: &a [*a]",
        "[" * 20_000,
        "{a: " * 3000,
        "- " * 5000,
        "? " * 3000 + "x",
        "a: 2020-13-45",
        "a: " + "9" * 10_000,
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!float x",
        "a: !!binary ===",
        "a: !!python/object/apply:os.system ['touch pwned']",
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "a: \x00",
        "<<: 3",
        "<<: [1, 2]",
        "&a : *b",
        "%YAML 9.9\n---\na",
        "a: 1\n---\nb: 2",
        "\ufeff",
        "",
        "3",
        "x" * 2_000_000,
        GOOD + "report: {eigenvalues: " + "9" * 4000 + "}",
        GOOD.replace("s.zarr", "s.zarr, memory_gib: .inf"),
        GOOD.replace("s.zarr", "s.zarr, memory_gib: 1.0e308"),
        GOOD.replace("s.zarr", "s.zarr, memory_gib: .nan"),
        GOOD.replace("s.zarr", f"s.zarr, workers: {10**30}"),
        GOOD.replace("s.zarr", f"s.zarr, seed: {10**30}"),
    ],
)
def test_odd_run_files_are_refused_soon(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert time.process_time() - began < 10
    assert len(str(caught.value)) < 3000
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00a", b"a: \xc3\x28", bytes(range(256)), b"\x80\x04."])
def test_files_that_are_no_text_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "run.yaml").write_bytes(raw)
    with pytest.raises(ConfigError):
        load(tmp_path / "run.yaml")
    with pytest.raises(ConfigError):
        load(tmp_path)


def test_a_device_without_an_end_is_read_no_further_than_a_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than"):
        load("/dev/zero")


def test_anchors_are_still_allowed(tmp_path: Path) -> None:
    text = "problem: {factory: 'a:b', arguments: {x: &x [1, 2], y: *x}}\ncompute: {store: s.zarr}\n"
    (tmp_path / "run.yaml").write_text(text)
    assert load(tmp_path / "run.yaml").problem.arguments == {"x": [1, 2], "y": [1, 2]}


KEYS = st.sampled_from(
    [
        "problem",
        "compute",
        "report",
        "factory",
        "arguments",
        "store",
        "parts",
        "workers",
        "seed",
        "checkpoint",
        "path",
        "dtype",
    ]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.one_of(
        TREES.map(yaml.safe_dump),
        st.text(max_size=60),
        st.fixed_dictionaries({"problem": TREES, "compute": TREES}).map(yaml.safe_dump),
    )
)
def test_any_text_is_a_run_file_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        made = load(file)
    except ConfigError:
        return
    assert isinstance(made, RunConfig)
    made.with_overrides(store="t.zarr")


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("made", ["torch", "torch zip", "raw pickle"])
@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_a_malicious_checkpoint_runs_nothing(
    tmp_path: Path, made: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if made == "raw pickle":
        Path("weights").write_bytes(pickle.dumps({"weight": Evil()}))
    else:
        torch.save({"weight": Evil()}, "weights", _use_new_zipfile_serialization=made == "torch zip")
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match="could not be read"):
        load_checkpoint(model, Checkpoint("weights", format))  # type: ignore[arg-type]
    assert not Path("pwned").exists()
    assert torch.equal(model.weight, before)
    pickle.loads(pickle.dumps(Evil()))
    assert Path("pwned").exists(), "the file would have run its command"
