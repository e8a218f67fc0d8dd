"""One run at a time writes a store: a lease beside it, with who holds it and a heartbeat.

The lease is a few small files in ``{store}.lock``, on a file system or an object store alike:

- ``holder``: the first claim. Whoever creates it where none is holds the lease.
- ``after-{token}``: the claim of whoever took the lease over from the claim with that token; exactly one can create it. The
  holder is the end of the chain that starts at ``holder``.
- ``beat-{token}``: the heartbeat of a claim, written again every few seconds.

A claim is only ever created, never changed, and tokens are never used twice; so nothing late (a taker that was slow, a holder
that was suspended) can undo what others decided meanwhile. A release ends the chain by a claim of its own, which nobody else can
then create, and removes ``holder`` first.

A claim may be taken over if its process is known to be dead, or if its heartbeat has not moved for a while: as the taker's own
clock saw it, or by the clock since the start of the machine where both run on one. A holder looks at the chain at every heartbeat,
and before it writes if it could not for a while; one that has been superseded raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, final

from disthess.errors import HeldError, StoreError
from disthess.store.claim import Claim, make_beat, read_claim
from disthess.store.place import AbstractPlace, place_of

HOLDER = "holder"
"""The file with the first claim."""

_LOG = logging.getLogger("disthess")
_ATTEMPTS = 50
_POLLS = 8
"""How often a foreign heartbeat is looked at per heartbeat of ours."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """How long things take, in seconds.

    Attributes:
        beat_seconds: Between two heartbeats.
        stale_seconds: A heartbeat that has not moved for this long belongs to nobody.
        wait: Whether to watch a heartbeat from another machine for that long, or to refuse at once.
    """

    beat_seconds: float = 5.0
    stale_seconds: float = 60.0
    wait: bool = True


@final
class StoreLock:
    """Context manager that refuses a second run on the same store.

    Args:
        path: The store, as path, URL or place; it need not exist yet. The lock is ``{path}.lock``.
        times: Heartbeat and patience.

    Raises:
        HeldError: Another run holds it (on entering).
        StoreError: It cannot be written (on entering).
    """

    def __init__(self, path: str | os.PathLike[str] | AbstractPlace, times: LeaseTimes = LeaseTimes()) -> None:
        store = place_of(path)
        self._store = store.name
        self._place = store.beside(".lock")
        self._times = times
        self._claim: Claim | None = None
        self._lost = ""
        self._renewed = 0.0
        self._ended = threading.Event()
        self._renewing = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with self._explained():
            self._claim = self._acquire()
            self._renewed = time.monotonic()
        with contextlib.suppress(StoreError, OSError):
            self._sweep()
        self._lost = ""
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep, name="disthess-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._claim is None or self._claim.pid != os.getpid():
            return
        if self._thread is not None:
            self._thread.join(timeout=self._times.beat_seconds)
        # A release that does not come through is made up for by the next run, which takes the lease over.
        with contextlib.suppress(StoreError, OSError):
            self._release(self._claim)
        self._claim = None

    def check(self) -> None:
        """Make sure that the lease is still ours; quick while its heartbeat goes well.

        Raises:
            StoreError: Another run has taken it over, or it could not be renewed for too long.
        """
        if self._claim is None:
            raise StoreError(f"The lock of the store {self._store} is not held; nothing more is written.")
        if not self._lost and time.monotonic() - self._renewed > self._times.stale_seconds / 2:
            with self._explained():
                self._renew()
        if self._lost:
            raise StoreError(self._lost)

    # -- taking it

    def _acquire(self) -> Claim:
        watch = _Watch(self._times)
        for _ in range(_ATTEMPTS):
            last = self._last_to_wait_for(watch)
            mine = Claim.make()
            key = HOLDER if last is None else f"after-{last.token}"
            if self._place.create(key, mine.to_bytes()):
                # Whoever ended the chain meanwhile has removed its start: then this claim hangs in the air.
                if self._ends_with(mine):
                    return mine
                self._place.remove(key)
            time.sleep(0.01)
        raise HeldError(
            f"The lock {self._place.name} keeps changing hands; other runs want the same store. Try again later."
        )

    def _last_to_wait_for(self, watch: _Watch) -> Claim | None:
        """The claim to take over from, once it may be; None where there is none."""
        while True:
            chain = self._chain()
            if not chain:
                return None
            beat = self._place.read(f"beat-{chain[-1].token}")
            state = watch.look(chain[-1], beat)
            if state == "dead":
                return chain[-1]
            if state == "alive":
                raise HeldError(self._refusal(chain[-1]))
            time.sleep(self._times.beat_seconds / _POLLS)

    def _chain(self) -> list[Claim]:
        """Claims from the first to the one that holds the lease; empty if nobody has it."""
        found: list[Claim] = []
        claim = read_claim(self._place, HOLDER)
        while claim is not None:
            found.append(claim)
            claim = read_claim(self._place, f"after-{claim.token}")
        return found

    def _ends_with(self, mine: Claim) -> bool:
        chain = self._chain()
        return bool(chain) and chain[-1].token == mine.token

    def _sweep(self) -> None:
        """Remove what claims outside the chain have left; nobody reads it."""
        known = {HOLDER}
        for claim in self._chain():
            known |= {f"after-{claim.token}", f"beat-{claim.token}"}
        for name in self._place.children():
            if name not in known and name.startswith(("after-", "beat-")):
                self._place.remove(name)

    # -- keeping it

    def _keep(self) -> None:
        while not self._ended.wait(self._times.beat_seconds):
            # The heartbeat is tried again next time; ``check`` says so if it fails for too long.
            with contextlib.suppress(Exception):
                self._renew()

    def _renew(self) -> None:
        with self._renewing:
            claim = self._claim
            if claim is None or self._lost or self._ended.is_set():
                return
            started = time.monotonic()
            chain = self._chain()
            if not any(entry.token == claim.token for entry in chain):
                self._lost = (
                    f"The lock {self._place.name} of this run was removed while it ran, so another run may write the store "
                    f"{self._store} now. This run stops; what is marked done stays. Run again to resume."
                )
            elif chain[-1].token != claim.token:
                self._lost = (
                    f"{chain[-1].who} has taken over the store {self._store}, because this run gave no sign of life for "
                    f"{self._times.stale_seconds:.0f} s (was it suspended, or cut off?). This run stops and writes no more; "
                    f"what is marked done stays."
                )
            else:
                self._place.write(f"beat-{claim.token}", make_beat())
                self._renewed = started

    # -- giving it back

    def _release(self, claim: Claim) -> None:
        started = time.monotonic()
        end = f"after-{claim.token}"
        if self._ends_with(claim) and self._place.create(end, Claim.make(released=True).to_bytes()):
            chain = self._chain()
            if claim.token not in [entry.token for entry in chain]:
                self._place.remove(end)
            elif not self._is_late(started):
                self._place.remove(HOLDER)
                for entry in chain:
                    self._place.remove(f"beat-{entry.token}")
                    self._place.remove(f"after-{entry.token}")
        self._place.remove(f"beat-{claim.token}")
        self._place.remove_if_empty()

    def _is_late(self, started: float) -> bool:
        """Whether a release took so long that somebody may have taken over from it."""
        return time.monotonic() - started > self._times.stale_seconds / 2

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"The lock {self._place.name} cannot be written ({error.strerror or error}), so the store {self._store} cannot "
                f"be either. Check the permissions and the space of that directory; if {self._place.name} is a file, it is the "
                f"lock of an older version: remove it if no run writes the store."
            ) from error

    def _refusal(self, claim: Claim) -> str:
        return (
            f"The store {self._store} is being written by {claim.who}. Two runs may not write one store: wait for it to end, or "
            f"choose another path. A run that no longer lives is noticed: at once on its own machine, elsewhere by a heartbeat "
            f"that stands still for {self._times.stale_seconds:.0f} s. If you are sure that it no longer runs, remove "
            f"{self._place.name} and run again."
        )


@final
class _Watch:
    """Looks at the end of the chain again and again, until it can be told dead or alive."""

    def __init__(self, times: LeaseTimes) -> None:
        self._times = times
        self._seen: tuple[str, bytes | None] | None = None
        self._since = 0.0

    def look(self, claim: Claim, beat: bytes | None) -> Literal["dead", "alive", "unknown"]:
        """What is known of the claim now."""
        dead = claim.is_dead(beat, self._times.stale_seconds)
        if dead:
            return "dead"
        seen = (claim.token, beat)
        moved = self._seen is not None and self._seen[0] == claim.token and self._seen != seen
        # A lease that is being given back is free in a moment.
        if not self._times.wait or ((dead is False or moved) and not claim.released):
            return "alive"
        if self._seen != seen:
            self._seen, self._since = seen, time.monotonic()
            if not claim.released:
                _LOG.warning(
                    "%s holds the lock; watching its heartbeat, %.0f s at most", claim.who, self._times.stale_seconds
                )
        return "dead" if time.monotonic() - self._since > self._times.stale_seconds else "unknown"
