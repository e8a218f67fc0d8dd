"""Run files: YAML, strict. An unknown key, a wrong type or a repeated key is an error that names its place.

    problem:
      factory: examples/digits_mlp.py:problem     # or package.module:function; returns a disthess.Problem
      arguments: {hidden: 64}
      checkpoint: {path: weights.safetensors, format: safetensors}
    compute:
      store: runs/digits_mlp.zarr
    report:
      eigenvalues: 10

Relative paths are relative to the current folder, as on any command line; a factory file or checkpoint that is not
there is looked for beside the run file as well.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, final

import pydantic
import yaml

from disthess.errors import ConfigError
from disthess.loading import Checkpoint, Source
from disthess.types import DType, Part

Count = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]

MOST_BYTES = 1 << 20
"""Largest run file."""

MOST_NODES = 100_000
"""Most values in one, each alias counted as what it stands for: a few lines of aliases can stand for billions."""

MOST_DEPTH = 50
"""Deepest nesting in one."""


class _Section(pydantic.BaseModel):
    """A part of a run file: frozen, strict types, no unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


@final
class CheckpointSection(_Section):
    """``problem.checkpoint``: weights to load into the factory's model."""

    path: str
    format: Literal["safetensors", "torch"]
    prefix: str = ""
    key: str | None = None


@final
class ProblemSection(_Section):
    """``problem``: which problem."""

    factory: str
    arguments: dict[str, Any] = pydantic.Field(default_factory=dict)
    checkpoint: CheckpointSection | None = None


@final
class ComputeSection(_Section):
    """``compute``: what to compute, where to, and with what. Every key but ``store`` has the default of `disthess.compute`."""

    store: str
    parts: Annotated[list[Part], pydantic.Field(min_length=1)] = ["hessian"]
    parameters: str | list[str] | None = None
    dtype: DType | None = None
    method: Literal["auto", "graph", "autograd"] = "auto"
    shared: Literal["auto", "uses", "sum"] = "auto"
    executor: Literal["serial", "threads", "ray"] = "serial"
    workers: Count | None = None
    threads: Count | None = None
    device: str | None = None
    activations: str | list[str] | None = None
    activations_per_sample: bool = False
    sections: dict[str, str] = pydantic.Field(default_factory=dict)
    memory_gib: Annotated[float, pydantic.Field(gt=0, le=2**40, allow_inf_nan=False)] | None = None
    address: str | None = None
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0


@final
class ReportSection(_Section):
    """``report``: what ``disthess run`` prints and draws when the store is whole.

    ``eigenvalues`` and ``blocks`` are numbers of rows (0 leaves the table out); ``density`` and ``pictures`` are yes or no.
    """

    eigenvalues: Annotated[int, pydantic.Field(ge=0, le=1_000_000)] = 10
    density: bool = True
    pictures: bool = True
    blocks: Annotated[int, pydantic.Field(ge=0, le=1_000_000)] = 10


@final
class RunConfig(_Section):
    """One run file."""

    problem: ProblemSection
    compute: ComputeSection
    report: ReportSection = ReportSection()

    def source(self, path: str | Path) -> Source:
        """Where the problem comes from; ``path`` is the run file's own."""
        section = self.problem
        checkpoint = section.checkpoint
        return Source(
            factory=section.factory,
            arguments=section.arguments,
            checkpoint=None if checkpoint is None else Checkpoint(**checkpoint.model_dump()),
            folders=(".", str(Path(path).resolve().parent)),
        )

    def with_overrides(self, **overrides: Any) -> RunConfig:
        """A copy with the ``compute`` keys that are not None replaced.

        Raises:
            ConfigError: A value is not allowed for its key.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        return parse(
            {**self.model_dump(), "compute": {**self.compute.model_dump(), **given}}, "the command line's options"
        )

    def plan_options(self) -> dict[str, Any]:
        """Keyword arguments of `disthess.plan`."""
        section = self.compute
        memory = section.memory_gib
        return {
            "parts": tuple(section.parts),
            "parameters": section.parameters,
            "dtype": section.dtype,
            "method": section.method,
            "shared": section.shared,
            "executor": section.executor,
            "workers": section.workers,
            "threads": section.threads,
            "device": section.device,
            "activations": section.activations,
            "activations_per_sample": section.activations_per_sample,
            "sections": section.sections,
            "memory_bytes": None if memory is None else int(memory * 2**30),
        }

    def compute_options(self) -> dict[str, Any]:
        """Keyword arguments of `disthess.compute`, beside the problem and the path."""
        return {**self.plan_options(), "address": self.compute.address, "seed": self.compute.seed}


def load(path: str | Path) -> RunConfig:
    """Read a run file.

    Args:
        path: A YAML file.

    Returns:
        Its contents, checked.

    Raises:
        ConfigError: The file does not exist, is not YAML, or holds an unknown key, a repeated key, or a value of the
            wrong kind; the message names the place.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no run file {file}. Give the path of a YAML file, for example configs/digits_mlp.yaml."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the run file {file} cannot be read: {error}. Give the path of a YAML text file.") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"the run file {file} has more than {MOST_BYTES:,} bytes. Give the path of a YAML run file.")
    try:
        tree = _tree(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {_yaml_trouble(error)}. Mend that line.") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply. Write it with fewer levels.") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML's constructors raise these for numbers and dates that are none, such as 2020-13-45.
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} holds a value that cannot be read ({said}). Put texts in quotes.") from error
    return parse(tree, str(file))


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


def parse(tree: Any, place: str) -> RunConfig:
    """Check a tree of dicts and lists, as from YAML; ``place`` is what messages call it.

    Raises:
        ConfigError: As for `load`.

    >>> parse({"problem": {"factory": "a:b"}, "compute": {"store": "s.zarr"}}, "here").compute.seed
    0
    """
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{place} holds {'nothing' if tree is None else type(tree).__name__}, where the sections problem, compute and (if "
            "wanted) report are expected."
        )
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        # Unknown keys first: a misspelt key is often the reason why another is missing.
        found = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
        said = "; ".join(_sentence(dict(entry)) for entry in found[:4])
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        raise ConfigError(f"{place}: {said}{more}.") from error


def _sentence(entry: dict[str, Any]) -> str:
    # Where a key takes one of several types, pydantic adds the type that it tried to the place.
    location = [part for part in entry["loc"] if part != "str" and not str(part).startswith("list[")]
    key, section = str(location[-1]) if location else "", location[:-1]
    where = f"section {'.'.join(map(str, section))}" if section else "the top level"
    if entry["type"] == "extra_forbidden":
        allowed = list(_model_at(section).model_fields)
        near = difflib.get_close_matches(key, allowed, n=2, cutoff=0.5)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        return f"unknown key {key!r} in {where}{hint}; allowed there are {', '.join(allowed)}"
    if entry["type"] == "missing":
        return f"the key {key!r} is missing in {where}"
    value = entry["input"]
    return f"{'.'.join(map(str, location))} is {_shown(value)}: {entry['msg'][0].lower()}{entry['msg'][1:]}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    text = reprlib.repr(value) if isinstance(value, (list, dict, set, tuple)) else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _model_at(section: list[Any]) -> type[pydantic.BaseModel]:
    """The section's model: ``["problem", "checkpoint"]`` gives `CheckpointSection`."""
    models: dict[str, type[pydantic.BaseModel]] = {
        "problem": ProblemSection,
        "problem.checkpoint": CheckpointSection,
        "compute": ComputeSection,
        "report": ReportSection,
    }
    return models.get(".".join(map(str, section)), RunConfig)


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
