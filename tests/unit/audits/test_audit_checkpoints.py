"""Which checkpoints an audit file means, and in which order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from disthess.audit_config import CheckpointsSection
from disthess.audits.checkpoints import find_checkpoints, step_of
from disthess.errors import ConfigError


def section(**keys: Any) -> CheckpointsSection:
    return CheckpointsSection.model_validate(keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, name in enumerate(("step-90.safetensors", "step-100.safetensors", "step-9.safetensors", "notes.txt")):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (1000 + place, 1000 + place))
    return tmp_path


def steps(found: Any) -> list[int | None]:
    return [one.step for one in found]


def test_globs_are_ordered_by_step_and_not_by_name(folder: Path) -> None:
    found = find_checkpoints(section(paths=["*.safetensors"], pattern="step-{step}.safetensors"), [str(folder)])
    assert steps(found) == [9, 90, 100]
    assert found[0].name == "step-9.safetensors"
    # A glob may match other files; a pattern leaves them out.
    assert steps(find_checkpoints(section(paths=["*"], pattern="step-{step}.safetensors"), [str(folder)])) == [
        9,
        90,
        100,
    ]


def test_a_file_named_twice_counts_once_and_absolute_paths_are_found(folder: Path) -> None:
    given = [str(folder / "step-9.safetensors"), "step-*.safetensors"]
    assert steps(find_checkpoints(section(paths=given), [str(folder)])) == [9, 90, 100]


def test_folders_are_looked_at_in_their_order(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert steps(find_checkpoints(section(paths=["step-9*"]), [str(empty), str(folder)])) == [9, 90]


def test_the_newest_is_the_largest_step_or_without_a_pattern_the_last_written(folder: Path) -> None:
    named = section(newest_in=str(folder), pattern="step-{step}.safetensors")
    assert steps(find_checkpoints(named)) == [100]
    assert [one.name for one in find_checkpoints(section(newest_in="."), [str(folder)])] == ["step-9.safetensors"]
    both = section(newest_in=".", paths=["step-9.safetensors"], pattern="step-{step}.safetensors")
    assert steps(find_checkpoints(both, [str(folder)])) == [9, 100]


def test_steps_are_read_from_names() -> None:
    assert step_of("epoch=3-step=0012.ckpt", "epoch=3-step={step}.ckpt") == 12
    assert step_of("epoch=3-step=0012.ckpt", None) == 12
    assert step_of("stepXsafetensors", "step{step}.safetensors") is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"paths": ["none-*.safetensors"]}, "matches no file"),
        ({"paths": ["step-9.safetensors"], "pattern": "model-{step}.pt"}, "not named as"),
        ({"paths": ["*"], "pattern": "model-{step}.pt"}, "no file of checkpoints.paths"),
        ({"newest_in": "missing"}, "no folder"),
        ({"newest_in": ".", "format": "torch"}, "holds no file"),
        ({"newest_in": ".", "pattern": "model-{step}.pt"}, "holds no file"),
    ],
)
def test_what_is_not_there_is_refused(folder: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_checkpoints(section(**keys), [str(folder)])
