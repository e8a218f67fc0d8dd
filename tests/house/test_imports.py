"""Imports go down only, each outside library has one door, and ``import disthess`` stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_import_contracts_hold() -> None:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = python("-c", script)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_import_contracts_would_notice(tmp_path: Path) -> None:
    """The same contracts on a copy where the lowest layer imports zarr and a layer above itself."""
    import shutil

    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "disthess", copy / "disthess", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "disthess" / "types.py").write_text("import zarr\nfrom disthess import hvp\n")
    script = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1
    assert "zarr is imported only by disthess.store BROKEN" in done.stdout
    assert "Imports go down only BROKEN" in done.stdout


@pytest.mark.parametrize(
    "statement", ["import disthess", "import disthess.cli.main", "import disthess.config", "import disthess.loading"]
)
def test_what_starts_every_command_loads_nothing_heavy(statement: str) -> None:
    script = f"import sys; {statement}; print([m for m in ('torch', 'ray', 'zarr', 'dask', 'matplotlib') if m in sys.modules])"
    assert python("-c", script).stdout.strip() == "[]"


def test_linear_algebra_and_plan_load_no_torch() -> None:
    script = (
        "import sys, importlib, pkgutil\n"
        "for package in ('disthess.linalg', 'disthess.planning'):\n"
        "    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "print([m for m in ('torch', 'ray', 'dask') if m in sys.modules])"
    )
    done = python("-c", script)
    assert done.stdout.strip() == "[]", done.stderr
