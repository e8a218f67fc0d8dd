"""Reading limits of the control groups that this process is in (Linux); nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def cgroup_directories() -> list[Path]:
    """Directories of this process's groups, leaf first, as far as they can be seen (version 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
    own = next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
    leaf = _ROOT / own.lstrip("/")
    return [place for place in (leaf, *leaf.parents) if place.is_relative_to(_ROOT) and place.is_dir()]


def read_text(path: Path) -> str | None:
    """A small file's text; None where it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
