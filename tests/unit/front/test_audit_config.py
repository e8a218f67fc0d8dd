"""Audit files: strict, with the place and near names in every message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disthess.audit_config import is_audit, load_audit, parse_audit
from disthess.config import parse
from disthess.config_text import read_tree
from disthess.errors import ConfigError

ROOT = Path(__file__).parents[3]


def tree(**sections: Any) -> dict[str, Any]:
    return {"problem": {"factory": "a:b"}, "history": "h.zarr", **sections}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_is_of_one_kind_and_right(path: Path) -> None:
    found = read_tree(path, "file", "")
    assert is_audit(found) == path.name.endswith("_audit.yaml")
    if is_audit(found):
        assert load_audit(path).history.endswith(".zarr")
    else:
        parse(found, str(path))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"histry": "x"}, "unknown key 'histry' in the top level .did you mean history"),
        ({"problem": {"factory": "a:b", "checkpoint": {}}}, "unknown key 'checkpoint' in section problem"),
        ({"alerts": [{"name": "a", "metric": "loss", "abvoe": 1.0}]}, "section alerts.0 .did you mean above"),
        ({"alerts": [{"name": "a", "metric": "loss"}] * 2}, "two alerts have the name 'a'"),
        ({"measure": {"probes": 10}}, "measure.probes is 10: input should be greater than or equal to 36"),
        ({"measure": {"seed": "0"}}, "measure.seed is '0'"),
        ({"measure": {"tolerance": 1.5}}, "measure.tolerance is 1.5"),
        ({"checkpoints": {}}, "give paths, newest_in, or both"),
        ({"checkpoints": {"paths": ["a"], "pattern": "step.pt"}}, "with {step} in it once"),
        ({"checkpoints": {"paths": ["a"], "pattern": "a/{step}.pt"}}, "the name of a file"),
        ({"blocks": "layers"}, "blocks is 'layers': input should be 'parameters', 'modules' or 'roles'"),
        ({"couplings": {"of": "blocks"}}, "there is no section blocks"),
        ({"couplings": {"of": "modules", "sections": {"a": "b"}}}, "of: parameters"),
        ({"tiles": {"a": ["b"]}}, "tiles.a is"),
        ({"hook": {"comand": "x"}}, "did you mean command"),
    ],
)
def test_mistakes_are_named_with_their_place(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_audit(tree(**sections), "here")


def test_nothing_and_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds nothing, where the sections problem"):
        parse_audit(None, "here")
    with pytest.raises(ConfigError, match="there is no audit file"):
        load_audit(tmp_path / "none.yaml")
    assert not is_audit({"problem": {}, "compute": {}, "history": "x"})
    assert not is_audit(None)


def test_defaults_and_names() -> None:
    found = parse_audit(tree(hook={"json": "alerts.jsonl"}), "here")
    assert found.hook.json_path == "alerts.jsonl"
    assert found.measure.effort().memory_bytes == 2 << 30
    assert found.checkpoints is None
    assert found.source("folder/audit.yaml").folders[1].endswith("folder")
