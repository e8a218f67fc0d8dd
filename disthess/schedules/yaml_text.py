"""YAML for people and machines: mappings, lists and scalars, every text in quotes, so that none is taken for something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def yaml_text(tree: Any) -> str:
    """A tree of mappings, lists, texts, whole numbers and truth values as YAML.

    Texts of several lines are written line by line where that keeps every letter.

    >>> print(yaml_text({"a": {"b": ["x: y", 2]}, "c": {}}), end="")
    a:
      b:
        - "x: y"
        - 2
    c: {}
    """
    return "".join(f"{line}\n" for line in _lines(tree))


def quoted(text: str) -> str:
    r"""A text in double quotes, as YAML reads it.

    >>> print(quoted('a "b"' + chr(10) + chr(7)))
    "a \"b\"\n\U00000007"
    """
    return '"' + "".join(_letter(letter) for letter in text) + '"'


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _entry(f"{key}:", inner)
    elif isinstance(value, list) and value:
        for inner in value:
            lines = list(_lines(inner))
            yield f"- {lines[0]}"
            yield from (f"  {line}" for line in lines[1:])
    else:
        yield _scalar(value)


def _entry(head: str, value: Any) -> Iterator[str]:
    if isinstance(value, (Mapping, list)) and value:
        yield head
        yield from (f"  {line}" for line in _lines(value))
    elif isinstance(value, str) and _is_block(value):
        yield f"{head} |2{'' if value.endswith(chr(10)) else '-'}"
        yield from (f"  {line}" if line else "" for line in value.removesuffix("\n").split("\n"))
    else:
        yield f"{head} {_scalar(value)}"


def _is_block(text: str) -> bool:
    """Whether a literal block keeps every letter of it."""
    lines = text.split("\n")
    return (
        len(lines) > 1
        and not text.endswith("\n\n")
        and text.strip("\n") != ""
        and all(line.isprintable() for line in lines)
    )


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if value in ({}, []):
        return str(value)
    raise TypeError(f"no YAML for {value!r}")


def _letter(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    if letter == "\n":
        return "\\n"
    return letter if letter.isprintable() else f"\\U{ord(letter):08X}"
