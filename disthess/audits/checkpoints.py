"""Finds checkpoints: named, by globs, or the newest of a folder; in the order of training."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disthess.audit_config import STEP, CheckpointsSection
from disthess.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """One of them.

    Attributes:
        path: The file.
        step: Of training, by its name; None where the name tells none.
    """

    path: str
    step: int | None

    @property
    def name(self) -> str:
        """What tables call it."""
        return Path(self.path).name


def step_of(name: str, pattern: str | None) -> int | None:
    """The step that a file's name tells: what stands for ``{step}``; without a pattern, its last whole number.

    >>> step_of("step-0120.safetensors", "step-{step}.safetensors"), step_of("model_7.pt", None), step_of("last.pt", None)
    (120, 7, None)
    """
    if pattern is None:
        found = re.findall(r"\d+", Path(name).stem)
        return int(found[-1]) if found else None
    before, after = pattern.split(STEP)
    form = re.fullmatch(f"{re.escape(before)}(\\d+){re.escape(after)}", name)
    return int(form[1]) if form else None


def find_checkpoints(section: CheckpointsSection, folders: Sequence[str] = (".",)) -> tuple[FoundCheckpoint, ...]:
    """All checkpoints that a section names: by step, those without one first, by their names.

    Raises:
        ConfigError: A path or glob matches no file, a name has no step where a pattern says that it has one, or the folder does not
            exist or holds no checkpoint.
    """
    found: dict[str, FoundCheckpoint] = {}
    for text in section.paths:
        for path in _matches(text, folders):
            step = step_of(path.name, section.pattern)
            if step is None and section.pattern is not None:
                if glob.has_magic(text):
                    continue
                raise ConfigError(
                    f"the checkpoint {path} is not named as checkpoints.pattern says, {section.pattern!r}."
                )
            found[str(path)] = FoundCheckpoint(str(path), step)
    if section.paths and not found:
        raise ConfigError(f"no file of checkpoints.paths is named as checkpoints.pattern says, {section.pattern!r}.")
    if section.newest_in is not None:
        newest = _newest(section, folders)
        found[newest.path] = newest
    return tuple(sorted(found.values(), key=lambda one: (-1 if one.step is None else one.step, one.name)))


def _matches(text: str, folders: Sequence[str]) -> list[Path]:
    """Files of the first folder that has any."""
    expanded = str(Path(text).expanduser())
    for folder in folders:
        names = [folder + "/" + expanded] if not Path(expanded).is_absolute() else [expanded]
        paths = [
            Path(name) for one in names for name in (glob.glob(one, recursive=True) if glob.has_magic(text) else [one])
        ]
        files = sorted({path.resolve() for path in paths if path.is_file()})
        if files:
            return files
    raise ConfigError(
        f"checkpoints.paths names {text!r}, which matches no file. Relative paths are looked for in {' and '.join(folders)}."
    )


def _newest(section: CheckpointsSection, folders: Sequence[str]) -> FoundCheckpoint:
    """The largest step where there is a pattern, else the file written last."""
    given = str(section.newest_in)
    place = next((path for folder in folders if (path := Path(folder, given).expanduser()).is_dir()), None)
    if place is None:
        raise ConfigError(f"checkpoints.newest_in is {given!r}, which is no folder.")
    files = [path.resolve() for path in sorted(place.iterdir()) if path.is_file() and not path.name.startswith(".")]
    if section.pattern is None:
        endings = (".safetensors",) if section.format == "safetensors" else (".pt", ".pth", ".bin", ".ckpt")
        files = [path for path in files if path.suffix in endings]
        newest = max(files, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)
        step = None if newest is None else step_of(newest.name, None)
    else:
        steps = {path: step_of(path.name, section.pattern) for path in files}
        newest = max(
            (path for path in files if steps[path] is not None), key=lambda path: steps[path] or 0, default=None
        )
        step = None if newest is None else steps[newest]
    if newest is None:
        wanted = section.pattern or f"*{endings[0]}"
        raise ConfigError(f"the folder {place} of checkpoints.newest_in holds no file like {wanted}.")
    return FoundCheckpoint(str(newest), step)
