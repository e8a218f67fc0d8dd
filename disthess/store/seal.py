"""A checksum over attributes, and an identity of a store: what tells a flipped letter in ``zarr.json``.

Chunks carry their own crc32c; the JSON beside them has none. So each group that disthess writes keeps one over its other
attributes, and the ledger keeps a hash of what the root says and nobody may change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import google_crc32c

from disthess.store.encode import to_json

SEAL = "checksum"
"""The attribute that holds the checksum of the others."""

_FIXED = ("schema", "dtype", "layout", "fingerprint")


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON values, with the checksum of the others among them.

    >>> is_unbroken(sealed({"a": (1, 2.5)})), is_unbroken({**sealed({"a": 1}), "a": 2})
    (True, False)
    """
    plain = {str(key): to_json(value) for key, value in attributes.items() if key != SEAL}
    return {**plain, SEAL: google_crc32c.value(_canonical(plain))}


def is_unbroken(attributes: Mapping[str, Any], *, needed: bool = False) -> bool:
    """Whether attributes have the checksum they were written with; where there is none, whether none is needed."""
    if SEAL not in attributes:
        return not needed
    try:
        return bool(sealed(attributes)[SEAL] == attributes[SEAL])
    except (TypeError, ValueError, RecursionError):
        return False


def identity_of(attributes: Mapping[str, Any]) -> str:
    """A hash of what a root says of schema, layout and problem: the same for every store of one problem and one plan."""
    fixed = {key: to_json(attributes.get(key)) for key in _FIXED}
    return hashlib.sha256(_canonical(fixed)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("utf-8", "surrogatepass")
