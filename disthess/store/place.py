"""Where a store lies: a directory, or a prefix of an object store; and the few things a store needs of either.

A place gives a Zarr store, and its files by key (``ledger/zarr.json``). Two promises are kept by all places, each in its own way:
a *group* is published whole or not at all, and of several that ``create`` the same key exactly one is told that it did.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, final

from typing_extensions import override
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from disthess.errors import ConfigError, StoreError

Build = Callable[[ZarrStore], Any]
"""Writes a group into an empty Zarr store."""

ROOT = "zarr.json"
"""The file that makes a directory or prefix a Zarr group."""

TEMPORARY = ".writing-"

URL_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
"""Object stores that obstore opens, lists and writes."""


class AbstractPlace(ABC):
    """Where one store lies, or its lock. Keys are words with slashes between."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The path or URL; ``place_of`` gives the place back, in any process."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether asking for a file costs next to nothing."""

    @abstractmethod
    def beside(self, ending: str) -> AbstractPlace:
        """The place whose name is this one's with something appended."""

    @abstractmethod
    def zarr_store(self, *, writable: bool) -> ZarrStore:
        """What zarr opens."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether a store, or what was taken for one, is there."""

    @abstractmethod
    def is_free(self) -> bool:
        """Whether a store may be made here."""

    @abstractmethod
    def check_group(self) -> None:
        """Refuse a place where no group can be.

        Raises:
            StoreError: Nothing is there, or no group.
        """

    @abstractmethod
    def is_writable(self) -> bool:
        """Whether this user may write, as far as that can be known without trying."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether a file is there."""

    @abstractmethod
    def holds(self, name: str) -> bool:
        """Whether the name of a group is taken, by a group or by anything else that no writer left."""

    @abstractmethod
    def open(self, key: str) -> tuple[BinaryIO, int]:
        """A file to read once from its start, and how many bytes it has.

        Raises:
            OSError: There is none, or it cannot be read.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write or replace a file, as a whole."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write a file that is not there yet, as a whole; False if it is there. Of several callers one is told True.

        ``data`` should be nobody else's, so that a caller whose answer was lost can tell that it was the one.
        """

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def children(self, key: str = "") -> list[str]:
        """Names directly below a key, of files and of groups, sorted."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Leave nothing behind where nothing is."""

    @abstractmethod
    def make(self, build: Build) -> None:
        """Make the store itself: whole, or not at all."""

    @abstractmethod
    def publish(self, name: str, build: Build) -> None:
        """Make or replace the group ``name`` inside the store: whole, or not there."""

    @abstractmethod
    def withdraw(self, name: str) -> None:
        """Remove the group ``name`` inside the store: at no time is a part of it taken for the whole."""

    @abstractmethod
    def remove_leftovers(self, groups: list[str]) -> int:
        """Remove what killed writers left; returns how many. ``groups`` are the names that ``publish`` may have begun."""

    @abstractmethod
    def total_bytes(self) -> int:
        """Bytes of all files."""

    def read(self, key: str) -> bytes | None:
        """All bytes of a file, or None if there is none."""
        try:
            file, _ = self.open(key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        with file:
            return file.read()


@final
class LocalPlace(AbstractPlace):
    """A directory. Groups are written under another name and moved."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    @override
    def name(self) -> str:
        return str(self._path)

    @property
    @override
    def is_local(self) -> bool:
        return True

    @override
    def beside(self, ending: str) -> AbstractPlace:
        return LocalPlace(self._path.with_name(self._path.name + ending))

    @override
    def zarr_store(self, *, writable: bool) -> ZarrStore:
        if writable and (link := self._link_inside()) is not None:
            raise StoreError(
                f"{link} is a symbolic link inside of {self.name}: what is written there would land elsewhere. Put a copy of what "
                f"it points at in its place, or open the store for reading alone."
            )
        return LocalStore(self._path, read_only=not writable)

    @override
    def exists(self) -> bool:
        return self._path.exists()

    @override
    def is_free(self) -> bool:
        return not (self._path.exists() or self._path.is_symlink())

    @override
    def check_group(self) -> None:
        if not self._path.exists():
            raise StoreError(f"There is no store at {self.name}. Check the path, or compute one with 'disthess run'.")
        if not self._path.is_dir():
            raise StoreError(f"{self.name} is a file; a store is a directory, such as runs/digits_mlp.zarr.")
        if not (self._path / ROOT).exists():
            raise StoreError(
                f"The directory {self.name} is no store: it has no zarr.json. Give the path of a store that 'disthess run' "
                f"has written (the directory itself, not its parent)."
            )

    @override
    def is_writable(self) -> bool:
        return os.access(self._path, os.W_OK)

    @override
    def has(self, key: str) -> bool:
        return (self._path / key).exists()

    @override
    def holds(self, name: str) -> bool:
        return (self._path / name).exists()

    @override
    def open(self, key: str) -> tuple[BinaryIO, int]:
        file = io.FileIO(self._path / key)
        return file, os.fstat(file.fileno()).st_size  # type: ignore[return-value]  # readinto is all that is used of it

    @override
    def read(self, key: str) -> bytes | None:
        try:
            return (self._path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @override
    def write(self, key: str, data: bytes) -> None:
        draft = self._draft(key, data)
        try:
            os.replace(draft, self._path / key)
        finally:
            draft.unlink(missing_ok=True)

    @override
    def create(self, key: str, data: bytes) -> bool:
        draft = self._draft(key, data)
        try:
            os.link(draft, self._path / key)
        except FileExistsError:
            return False
        except FileNotFoundError:  # the directory was removed meanwhile, as empty
            return self.create(key, data)
        except OSError:  # a file system without hard links
            return self._create_exclusive(key, data)
        finally:
            draft.unlink(missing_ok=True)
        return True

    @override
    def remove(self, key: str) -> None:
        with contextlib.suppress(NotADirectoryError):
            (self._path / key).unlink(missing_ok=True)

    @override
    def children(self, key: str = "") -> list[str]:
        try:
            return sorted(entry.name for entry in (self._path / key).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    @override
    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self._path.rmdir()

    @override
    def make(self, build: Build) -> None:
        temporary = self._path.with_name(f".{self._path.name}.creating-{uuid.uuid4().hex[:12]}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            build(LocalStore(temporary))
            os.rename(temporary, self._path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @override
    def publish(self, name: str, build: Build) -> None:
        temporary = self._temporary()
        try:
            build(LocalStore(temporary))
            old, target = self._temporary(), self._path / name
            if target.exists():
                os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @override
    def withdraw(self, name: str) -> None:
        old = self._temporary()
        os.rename(self._path / name, old)
        shutil.rmtree(old, ignore_errors=True)

    @override
    def remove_leftovers(self, groups: list[str]) -> int:
        partial = [*self._path.rglob("*.partial")]
        for file in partial:
            file.unlink(missing_ok=True)
        left = [*self._path.glob(f"{TEMPORARY}*")]
        for place in left:
            shutil.rmtree(place, ignore_errors=True)
        return len(partial) + len(left)

    @override
    def total_bytes(self) -> int:
        return sum(entry.stat().st_size for entry in self._path.rglob("*") if entry.is_file())

    def _link_inside(self) -> Path | None:
        """A symbolic link below the directory, which itself may be one; the walk follows none."""
        for folder, directories, files in os.walk(self._path):
            for name in (*directories, *files):
                if os.path.islink(os.path.join(folder, name)):
                    return Path(folder, name)
        return None

    def _temporary(self) -> Path:
        return self._path / f"{TEMPORARY}{uuid.uuid4().hex}"

    def _draft(self, key: str, data: bytes) -> Path:
        target = self._path / key
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        for _ in range(10):
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # somebody removed the directory, as empty
                draft.write_bytes(data)
                return draft
        raise FileNotFoundError(f"{target.parent} keeps being removed")

    def _create_exclusive(self, key: str, data: bytes) -> bool:
        try:
            with (self._path / key).open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a store's name is the URL of an object store, and no path.

    >>> is_url("s3://bucket/run.zarr"), is_url("runs/digits.zarr")
    (True, False)
    """
    return "://" in os.fspath(path)


def place_of(path: str | os.PathLike[str] | AbstractPlace) -> AbstractPlace:
    """The place that a path or URL names; ``~`` is the home folder.

    Raises:
        ConfigError: It is no path.
        StoreError: A URL of a kind that cannot hold a store, or the package for object stores is missing.
    """
    if isinstance(path, AbstractPlace):
        return path
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"expected the path or URL of a store, got {type(path).__name__}. Give a path, such as runs/digits.zarr."
        )
    text = os.fspath(path)
    if "\0" in text:
        raise StoreError(f"The path {text!r} of a store has a zero byte in it. Give a path, such as runs/digits.zarr.")
    if not is_url(text):
        return LocalPlace(Path(text).expanduser().absolute())
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme not in URL_SCHEMES or not bucket or not key.strip("/"):
        raise StoreError(
            f"{text} cannot hold a store. Give a path, such as runs/digits.zarr, or the URL of an object store with a bucket and "
            f"a name in it, such as s3://bucket/runs/digits.zarr; schemes are {', '.join(URL_SCHEMES)}."
        )
    # Only a store on an object store needs obstore, which is an extra.
    try:
        from disthess.store.object_place import ObjectPlace
    except ImportError as error:
        raise StoreError(
            f"The store {text} is on an object store, which needs the package obstore ({first_line(error)}). Install it by "
            f'pip install "disthess[s3]", or give a path on a file system.'
        ) from error
    return ObjectPlace(text.rstrip("/"))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to a length that fits a message."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
