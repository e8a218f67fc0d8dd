"""Documentation runs: doctests of every module, and every block of the README unless it is marked and says why."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import disthess
from disthess import config
from disthess.audit_config import is_audit, parse_audit

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(disthess.__path__, "disthess.")
    if module.name != "disthess.__main__"
)
FENCE = re.compile(r"((?:<!--[^\n]*-->\n)*)```(\w*)\n(.*?)\n```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    excused: bool


def readme_blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text()
    return [Block(found[2], found[3], "<!-- not run" in found[1]) for found in FENCE.finditer(text)]


@pytest.mark.parametrize("name", MODULES)
def test_doctests_pass(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.timeout(900)
def test_readme_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    namespace: dict[str, object] = {"__name__": "readme"}
    ran = {"python": 0, "console": 0, "yaml": 0}
    for block in readme_blocks():
        if block.excused:
            continue
        assert block.language in ran, f"a block of the README is neither run nor excused:\n{block.text}"
        ran[block.language] += 1
        if block.language == "python":
            exec(compile(block.text, "README.md", "exec"), namespace)
        elif block.language == "yaml":
            tree = yaml.safe_load(block.text)
            (parse_audit if is_audit(tree) else config.parse)(tree, "README.md")
        else:
            for line in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
                done = subprocess.run(
                    line, shell=True, capture_output=True, text=True, env={**os.environ, "PATH": path}
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert all(ran.values()), ran


def test_readme_lists_every_option() -> None:
    text = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert set(config.ComputeSection.model_fields) <= listed
    for key in config.ReportSection.model_fields:
        assert f"`{key}`" in text


def test_readme_has_the_two_commands_and_ci_calls_the_second() -> None:
    text = (ROOT / "README.md").read_text()
    install = 'python3 -m venv .venv && .venv/bin/pip install -e ".[{}]" && '
    assert install.format("examples") + ".venv/bin/disthess run configs/digits_mlp.yaml" in text
    assert install.format("test") + ".venv/bin/pytest" in text
    script = (ROOT / ".ci" / "run").read_text().replace('eval "$command"', "")
    done = subprocess.run(["bash", "-c", script, str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert done.stdout.strip() == "+ " + install.format("test").replace(".venv", ".ci-venv") + ".ci-venv/bin/pytest"


def test_costs_in_the_readme_are_p_squared() -> None:
    assert "P² numbers" in (ROOT / "README.md").read_text()[:2500]
    assert f"{8970**2 * 4 / 1e6:.0f} MB" == "322 MB"
