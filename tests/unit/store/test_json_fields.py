"""Fields of JSON from anywhere: the right ones come back, and of wrong ones a sentence says where and what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from disthess.store.json_fields import MOST_INTEGER, read_entries, read_field, read_text, read_whole


def test_what_is_right_comes_back() -> None:
    assert read_field({"a": None}, "a") is None
    assert read_entries([1, "b"], "x") == [1, "b"]
    assert read_text("", "x") == ""
    assert read_whole(MOST_INTEGER, "x") == MOST_INTEGER
    assert read_whole(1, "x", 1, least=1) == 1


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no mapping": (lambda: read_field([1], "rows"), "what should hold rows is [1], not a mapping"),
    "no mapping, named": (lambda: read_field(3, "rows", "layout"), "layout is 3, not a mapping"),
    "missing": (lambda: read_field({}, "rows"), "rows is missing"),
    "missing, named": (lambda: read_field({}, "rows", "layout"), "layout.rows is missing"),
    "no list": (lambda: read_entries({str(at): at for at in range(9)}, "x"), "x is a mapping of 9 entries, not a list"),
    "no text": (lambda: read_text(None, "x"), "x is None, not a text"),
    "truth": (lambda: read_whole(True, "x", 5), "x is True, not a whole number from 0 to 5"),
    "too small": (lambda: read_whole(0, "x", 5, least=1), "x is 0, not a whole number from 1 to 5"),
    "too large": (lambda: read_whole(6, "x", 5), "x is 6, not a whole number from 0 to 5"),
    "vast": (
        lambda: read_whole(10**400, "x", 5),
        "x is a number of more than 60 digits, not a whole number from 0 to 5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    read, words = WRONG[name]
    with pytest.raises(ValueError) as caught:
        read()
    assert str(caught.value) == words
