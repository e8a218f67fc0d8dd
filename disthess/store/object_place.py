"""A place on an object store (S3, Google, Azure, and servers that speak their protocols), through obstore.

There is no rename: what makes a group is its ``zarr.json``, so that is written last and removed first. What is left without one was
being written when the writer died, and means nothing. Every error of the object store becomes one sentence about what to do;
requests are tried again for some seconds, no longer.

Credentials, endpoint and region come from the environment as obstore reads them (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` ...).
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, BinaryIO, final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url
from typing_extensions import override
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import MemoryStore, ObjectStore

from disthess.errors import StoreError
from disthess.store.place import ROOT, AbstractPlace, Build, first_line

MARK = ".disthess-creating"
"""Lies beside a store's metadata while the store is made: without ``zarr.json``, all of it may be removed."""

UPLOADS = 8

_RETRY: Any = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=4), "base": 2},
}


@final
class ObjectPlace(AbstractPlace):
    """A prefix of a bucket.

    Args:
        url: Such as ``s3://bucket/runs/digits.zarr``.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with translated(url):
            self._objects: Any = from_url(url, retry_config=_RETRY)

    def __reduce__(self) -> tuple[type[ObjectPlace], tuple[str]]:
        """Its name travels; credentials do not."""
        return ObjectPlace, (self._url,)

    @property
    @override
    def name(self) -> str:
        return self._url

    @property
    @override
    def is_local(self) -> bool:
        return False

    @override
    def beside(self, ending: str) -> AbstractPlace:
        return ObjectPlace(self._url + ending)

    @override
    def zarr_store(self, *, writable: bool) -> ZarrStore:
        return _TranslatingStore(self._objects, self._url, read_only=not writable)

    @override
    def exists(self) -> bool:
        return self.has(ROOT)

    @override
    def is_free(self) -> bool:
        return not self.has(ROOT) and (self.has(MARK) or not self._any(""))

    @override
    def check_group(self) -> None:
        if self.has(ROOT):
            return
        if self._any("") and not self.has(MARK):
            raise StoreError(
                f"{self._url} is no store: it has no zarr.json. Give the URL of a store that 'disthess run' has written."
            )
        raise StoreError(f"There is no store at {self._url}. Check the URL, or compute one with 'disthess run'.")

    @override
    def is_writable(self) -> bool:
        return True

    @override
    def has(self, key: str) -> bool:
        try:
            obstore.head(self._objects, key)
        except FileNotFoundError:
            return False
        except (BaseError, OSError) as error:
            raise explain(self._url, error) from error
        return True

    @override
    def holds(self, name: str) -> bool:
        return self.has(f"{name}/{ROOT}")

    @override
    def open(self, key: str) -> tuple[BinaryIO, int]:
        try:
            data = bytes(obstore.get(self._objects, key).bytes())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise explain(self._url, error) from error
            raise
        except (BaseError, OSError) as error:
            raise explain(self._url, error) from error
        return io.BytesIO(data), len(data)

    @override
    def write(self, key: str, data: bytes) -> None:
        with translated(self._url):
            obstore.put(self._objects, key, data)

    @override
    def create(self, key: str, data: bytes) -> bool:
        try:
            obstore.put(self._objects, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # A request whose answer was lost is sent again, and then finds what itself has written.
            return self.read(key) == data
        except (BaseError, OSError) as error:
            raise explain(self._url, error) from error
        return True

    @override
    def remove(self, key: str) -> None:
        with translated(self._url), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._objects, key)

    @override
    def children(self, key: str = "") -> list[str]:
        with translated(self._url):
            found = obstore.list_with_delimiter(self._objects, key or None)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    @override
    def remove_if_empty(self) -> None:
        """There are no empty prefixes."""

    @override
    def make(self, build: Build) -> None:
        files = _files(build)
        self.create(MARK, b"")
        for key in self._keys(""):
            if key != MARK:
                self.remove(key)
        self._upload(files, "")
        if not self.create(ROOT, files[ROOT]):
            raise StoreError(f"Another run made the store {self._url} meanwhile. Run again, which resumes it.")
        self.remove(MARK)

    @override
    def publish(self, name: str, build: Build) -> None:
        files = _files(build)
        self.withdraw(name)
        self._upload(files, f"{name}/")
        self.write(f"{name}/{ROOT}", files[ROOT])

    @override
    def withdraw(self, name: str) -> None:
        self.remove(f"{name}/{ROOT}")
        self._remove_all(f"{name}/")

    @override
    def remove_leftovers(self, groups: list[str]) -> int:
        for name in groups:
            self._remove_all(f"{name}/")
        marked = self.has(MARK)
        if marked:
            self.remove(MARK)
        return len(groups) + marked

    @override
    def total_bytes(self) -> int:
        with translated(self._url):
            return sum(entry["size"] for page in obstore.list(self._objects) for entry in page)

    def _any(self, prefix: str) -> bool:
        with translated(self._url):
            return any(page for page in obstore.list(self._objects, prefix or None, chunk_size=1))

    def _keys(self, prefix: str) -> list[str]:
        with translated(self._url):
            return [entry["path"] for page in obstore.list(self._objects, prefix or None) for entry in page]

    def _remove_all(self, prefix: str) -> None:
        for key in self._keys(prefix):
            self.remove(key)

    def _upload(self, files: dict[str, bytes], prefix: str) -> None:
        """All files of a group but the one that makes it a group."""
        with ThreadPoolExecutor(UPLOADS) as pool:
            inner = [(prefix + key, data) for key, data in files.items() if key != ROOT]
            list(pool.map(lambda pair: self.write(*pair), inner))


@final
class _TranslatingStore(ObjectStore[Any]):
    """zarr's store on obstore, with errors for people."""

    def __init__(self, store: Any, url: str = "", *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self._url = url

    @override
    def with_read_only(self, read_only: bool = False) -> _TranslatingStore:
        return _TranslatingStore(self.store, self._url, read_only=read_only)

    @override
    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        with translated(self._url):
            return await super().get(key, prototype, byte_range)

    @override
    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        with translated(self._url):
            return await super().get_partial_values(prototype, key_ranges)

    @override
    async def exists(self, key: str) -> bool:
        with translated(self._url):
            return await super().exists(key)

    @override
    async def set(self, key: str, value: Buffer) -> None:
        with translated(self._url):
            await super().set(key, value)

    @override
    async def delete(self, key: str) -> None:
        with translated(self._url):
            await super().delete(key)

    @override
    def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        return _translated_names(self._url, super().list_dir(prefix))


async def _translated_names(url: str, names: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    with translated(url):
        async for name in names:
            yield name


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn the object store's errors into ours.

    Raises:
        StoreError: One sentence about what is wrong.
    """
    try:
        yield
    except (BaseError, OSError) as error:
        raise explain(url, error) from error


def explain(url: str, error: BaseException) -> StoreError:
    """What an object store's error means for the user."""
    text = str(error)
    bucket = "://".join((url.split("://")[0], url.split("://")[1].split("/")[0]))
    if "NoSuchBucket" in text or "NoSuchContainer" in text or "ContainerNotFound" in text:
        return StoreError(
            f"There is no bucket {bucket}, which the store {url} should lie in. Create it, or check the URL."
        )
    if _is_refused(text):
        return StoreError(
            f"The object store refuses access to {url} ({_said(error)}). Check the credentials in the environment "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your provider) and the permissions on {bucket}."
        )
    if "BadScheme" in text:
        return StoreError(
            f"The endpoint of {url} is plain http, which has to be allowed: set AWS_ALLOW_HTTP=true, or use https."
        )
    if "kind: Connect" in text or "error sending request" in text or "kind: Timeout" in text:
        return StoreError(
            f"The object store of {url} cannot be reached ({_said(error)}). Check the network and the endpoint "
            f"(AWS_ENDPOINT_URL). What is marked done stays; run again, which resumes."
        )
    return StoreError(
        f"The object store of {url} failed: {_said(error)}. What is marked done stays; once that is mended, run again, "
        f"which resumes."
    )


def _is_refused(text: str) -> bool:
    refusals = (
        r"\b40[13] \w",
        "MissingAccessKeyId",
        "MissingAccount",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "AccessDenied",
        "CredentialsError",
        "169\\.254\\.169\\.254",
    )
    return any(re.search(refusal, text) for refusal in refusals)


def _said(error: BaseException) -> str:
    """The object store's own code and words where it gave any, else its status, else the first line."""
    found = re.search(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", str(error), re.DOTALL)
    if found is None:
        found = re.search(r"status code: (\d{3} [A-Za-z ]+)", str(error))
    return ": ".join(word for word in found.groups() if word) if found else first_line(error)


def _files(build: Build) -> dict[str, bytes]:
    """What a group consists of."""
    files: dict[str, Buffer] = {}
    build(MemoryStore(files))
    return {key: value.to_bytes() for key, value in files.items()}
