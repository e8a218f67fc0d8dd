"""Small files, telling names, and nothing at the top that does not belong there."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = {"pyproject.toml", "README.md", "LICENSE", "disthess", "cluster", "tests", "configs", "examples"}
SOURCES = sorted((ROOT / "disthess").rglob("*.py"))
MOST_LINES = 400
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "core"}


def tracked_or_new() -> list[str]:
    """What git would take: tracked files and new ones that are not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_only_the_agreed_names_lie_at_the_top() -> None:
    found = {path.split("/")[0] for path in tracked_or_new()}
    assert {name for name in found if not name.startswith(".")} <= TOP


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in long.items() if count > MOST_LINES} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(path) for path in SOURCES if path.stem in VAGUE or path.parent.name in VAGUE] == []


def test_package_initialisers_hold_nothing_but_a_docstring() -> None:
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != ROOT / "disthess":
            body = ast.parse(path.read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_user_input_is_never_checked_by_assert() -> None:
    """``python -O`` removes assert statements."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_torch_files_are_read_without_running_code() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", path


def test_the_licence_and_the_pages_for_readers_are_there() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "disthess" / "store" / "SCHEMA.md").is_file()
    assert (ROOT / "cluster" / "README.md").is_file()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
