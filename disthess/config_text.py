"""Strict YAML: how a file becomes a checked tree, and what is said where it is wrong.

An unknown key, a wrong type or a repeated key is an error that names its place. Files are read without running code, and refused
where they are too long, too deep, or stand for too many values.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar, final, get_args

import pydantic
import yaml

from disthess.errors import ConfigError

Count = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]

Seed = Annotated[int, pydantic.Field(ge=0, lt=2**63)]

MOST_BYTES = 1 << 20
"""Largest file."""

MOST_NODES = 100_000
"""Most values in one, each alias counted as what it stands for: a few lines of aliases can stand for billions."""

MOST_DEPTH = 50
"""Deepest nesting in one."""


_CHOICES = ("list[", "dict[", "literal[", "function-")
"""What pydantic adds to a place where a key takes one of several types."""


class Section(pydantic.BaseModel):
    """A part of a file: frozen, strict types, no unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


AnySection = TypeVar("AnySection", bound=Section)


def read_tree(path: str | Path, what: str, example: str) -> Any:
    """The values of a YAML file.

    Args:
        path: The file.
        what: What messages call it, ``run file``.
        example: A file of that kind that exists.

    Raises:
        ConfigError: It is no path, does not exist, is too large, or is not YAML.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"expected the path of a {what}, got {type(path).__name__}. Give one, such as {example}.")
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {what} {file}. Give the path of a YAML file, for example {example}.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the {what} {file} cannot be read: {error}. Give the path of a YAML text file.") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"the {what} {file} has more than {MOST_BYTES:,} bytes. Give the path of a YAML {what}.")
    try:
        return _tree(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {_yaml_trouble(error)}. Mend that line.") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply. Write it with fewer levels.") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML's constructors raise these for numbers and dates that are none, such as 2020-13-45.
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} holds a value that cannot be read ({said}). Put texts in quotes.") from error


def _tree(text: str) -> Any:
    """The values of a YAML text, once their number and depth, aliases followed, are known to be small."""
    loader = _UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values and depth of a node, each node once; refuses too many, too deep, and a node inside itself."""
    if id(node) in known:
        count, depth = known[id(node)]
        if count < 0:
            raise yaml.constructor.ConstructorError(None, None, "a value contains itself", node.start_mark)
        return count, depth
    known[id(node)] = (-1, 0)
    inner = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
    sizes = [_measure(entry, known) for pair in inner for entry in (pair if isinstance(pair, tuple) else (pair,))]
    count, depth = 1 + sum(size for size, _ in sizes), 1 + max((below for _, below in sizes), default=0)
    if count > MOST_NODES or depth > MOST_DEPTH:
        what = (
            f"more than {MOST_NODES:,} values, aliases counted"
            if count > MOST_NODES
            else f"nested over {MOST_DEPTH} deep"
        )
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    known[id(node)] = (count, depth)
    return count, depth


def check_tree(model: type[AnySection], tree: Any, place: str, expected: str) -> AnySection:
    """Check a tree of dicts and lists, as from YAML.

    Args:
        model: What it is to be.
        tree: The values.
        place: What messages call it.
        expected: The sections, for where there are none.

    Raises:
        ConfigError: An unknown or missing key, or a value of the wrong kind; the message names the place.
    """
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{place} holds {'nothing' if tree is None else type(tree).__name__}, where the sections {expected} are expected."
        )
    try:
        return model.model_validate(tree)
    except pydantic.ValidationError as error:
        # Unknown keys first: a misspelt key is often the reason why another is missing.
        found = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
        said = "; ".join(_sentence(model, dict(entry)) for entry in found[:4])
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        raise ConfigError(f"{place}: {said}{more}.") from error


def _sentence(root: type[Section], entry: dict[str, Any]) -> str:
    location = [part for part in entry["loc"] if part != "str" and not str(part).startswith(_CHOICES)]
    key, section = str(location[-1]) if location else "", location[:-1]
    where = f"section {'.'.join(map(str, section))}" if section else "the top level"
    if entry["type"] == "extra_forbidden":
        allowed = list(_model_at(root, section).model_fields)
        near = difflib.get_close_matches(key, allowed, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        return f"unknown key {key!r} in {where}{hint}; allowed there are {', '.join(allowed)}"
    if entry["type"] == "missing":
        return f"the key {key!r} is missing in {where}"
    value = entry["input"]
    said = str(entry["msg"]).removeprefix("Value error, ")
    return f"{'.'.join(map(str, location)) or 'the file'} is {_shown(value)}: {said[0].lower()}{said[1:]}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = reprlib.repr(value) if isinstance(value, (list, dict, set, tuple)) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _model_at(root: type[pydantic.BaseModel], section: list[Any]) -> type[pydantic.BaseModel]:
    """The section's model: of ``["problem", "checkpoint"]`` that of checkpoints."""
    found = root
    for part in section:
        if part in found.model_fields:
            found = _model_in(found.model_fields[part].annotation) or found
    return found


def _model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The first model that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part)) is not None), None)


@final
class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without code and without repeated keys, of which plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, its keys checked."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _yaml_trouble(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    trouble = getattr(error, "problem", None) or "it cannot be parsed"
    return f"{trouble} at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else str(trouble)
