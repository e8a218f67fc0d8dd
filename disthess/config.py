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

from pathlib import Path
from typing import Annotated, Any, Literal, final

import pydantic

from disthess.config_text import Count, Section, Seed, check_tree, read_tree
from disthess.loading import Checkpoint, Source
from disthess.types import DType, Part


@final
class CheckpointSection(Section):
    """``problem.checkpoint``: weights to load into the factory's model."""

    path: str
    format: Literal["safetensors", "torch"]
    prefix: str = ""
    key: str | None = None


@final
class ProblemSection(Section):
    """``problem``: which problem."""

    factory: str
    arguments: dict[str, Any] = pydantic.Field(default_factory=dict)
    checkpoint: CheckpointSection | None = None


@final
class ComputeSection(Section):
    """``compute``: what to compute, where to, and with what. Every key but ``store`` has the default of `disthess.compute`."""

    store: str
    parts: Annotated[list[Part], pydantic.Field(min_length=1)] = pydantic.Field(
        default_factory=lambda: list[Part](["hessian"])
    )
    parameters: str | list[str] | None = None
    dtype: DType | None = None
    method: Literal["auto", "graph", "autograd"] = "auto"
    shared: Literal["auto", "uses", "sum"] = "auto"
    executor: Literal["serial", "threads", "processes", "ray"] = "serial"
    workers: Count | None = None
    threads: Count | None = None
    device: str | None = None
    activations: str | list[str] | None = None
    activations_per_sample: bool = False
    sections: dict[str, str] = pydantic.Field(default_factory=dict)
    memory_gib: Annotated[float, pydantic.Field(gt=0, le=2**40, allow_inf_nan=False)] | None = None
    address: str | None = None
    seed: Seed = 0


@final
class ReportSection(Section):
    """``report``: what ``disthess run`` prints and draws when the store is whole.

    ``eigenvalues`` and ``blocks`` are numbers of rows (0 leaves the table out); ``density`` and ``pictures`` are yes or no.
    """

    eigenvalues: Annotated[int, pydantic.Field(ge=0, le=1_000_000)] = 10
    density: bool = True
    pictures: bool = True
    blocks: Annotated[int, pydantic.Field(ge=0, le=1_000_000)] = 10


@final
class RunConfig(Section):
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
    return parse(read_tree(path, "run file", "configs/digits_mlp.yaml"), str(Path(path)))


def parse(tree: Any, place: str) -> RunConfig:
    """Check a tree of dicts and lists, as from YAML; ``place`` is what messages call it.

    Raises:
        ConfigError: As for `load`.

    >>> parse({"problem": {"factory": "a:b"}, "compute": {"store": "s.zarr"}}, "here").compute.seed
    0
    """
    return check_tree(RunConfig, tree, place, "problem, compute and (if wanted) report")
