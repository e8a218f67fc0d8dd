"""Audit files: which checkpoints, what of each, where the numbers go, and when to raise an alert. Strict, as run files are.

problem:
  factory: examples/digits_mlp.py:problem
  arguments: {steps: 0}
checkpoints:
  paths: ["runs/checkpoints/step-*.safetensors"]
  pattern: step-{step}.safetensors
measure: {probes: 48, seed: 0}
blocks: modules
history: runs/digits_audit.zarr
alerts:
  - {name: too sharp, metric: lambda_max, above: 50.0}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, final

import pydantic

from disthess.blocks import Grouping
from disthess.config_text import Count, Section, Seed, check_tree, read_tree
from disthess.linalg.summary import DENSITY, Effort
from disthess.loading import CheckpointFormat, Source
from disthess.types import DType

Share = Annotated[float, pydantic.Field(gt=0, lt=1)]
Number = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Patterns = str | Annotated[list[str], pydantic.Field(min_length=1)]

STEP = "{step}"
"""Stands for the step of training in the pattern of checkpoints' names."""


@final
class AuditedSection(Section):
    """``problem``: which problem; its weights come from the checkpoints."""

    factory: str
    arguments: dict[str, Any] = pydantic.Field(default_factory=dict)


@final
class CheckpointsSection(Section):
    """``checkpoints``: files of weights; all of ``paths``, and the newest of those in the folder ``newest_in``.

    ``pattern`` is the name of a file with ``{step}`` where the step of training stands; with ``newest_in`` it also says which files
    of the folder are checkpoints.
    """

    paths: list[str] = pydantic.Field(default_factory=list)
    newest_in: str | None = None
    pattern: str | None = None
    format: CheckpointFormat = "safetensors"
    prefix: str = ""
    key: str | None = None

    @pydantic.model_validator(mode="after")
    def _check(self) -> CheckpointsSection:
        if not self.paths and self.newest_in is None:
            raise ValueError("give paths, newest_in, or both")
        if self.pattern is not None and (self.pattern.count(STEP) != 1 or "/" in self.pattern):
            raise ValueError(
                f"pattern must be the name of a file with {STEP} in it once, such as step-{STEP}.safetensors"
            )
        return self


@final
class MeasureSection(Section):
    """``measure``: which numbers, and how much work goes into each.

    ``metrics`` are those of the whole model and ``block_metrics`` those of the blocks; default all, but that the spectral
    ``density`` of blocks has to be named. The rest are the fields of `disthess.Effort`, and where and in what precision products
    are taken. With ``steps`` what an audit costs is known before.
    """

    metrics: Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    block_metrics: Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    probes: Annotated[int, pydantic.Field(ge=36, le=100_000)] = 48
    density_probes: Count = 8
    density_steps: Count = 40
    tolerance: Share = 1e-4
    max_products: Count = 400
    steps: Count | None = None
    krylov: Count = 100
    confidence: Share = 0.95
    seed: Seed = 0
    dtype: DType | None = None
    parameters: Patterns | None = None
    executor: Literal["serial", "ray"] = "serial"
    address: str | None = None
    workers: Count | None = None
    threads: Count | None = None
    device: str = "cpu"
    memory_gib: Annotated[float, pydantic.Field(gt=0, le=2**40, allow_inf_nan=False)] = 2.0

    @pydantic.model_validator(mode="after")
    def _check(self) -> MeasureSection:
        if self.steps is not None and "max_products" in self.model_fields_set:
            raise ValueError(
                "steps is how many products extreme eigenvalues take, max_products how many they take at most; give one"
            )
        return self

    def effort(self) -> Effort:
        """The work that goes into a summary."""
        return Effort(
            probes=self.probes,
            density_probes=self.density_probes,
            density_steps=self.density_steps,
            tolerance=self.tolerance,
            max_products=self.max_products,
            memory_bytes=max(1, int(self.memory_gib * 2**30)),
            confidence=self.confidence,
            seed=self.seed,
            steps=self.steps,
        )


@final
class CouplingsSection(Section):
    """``couplings``: norms and couplings of all pairs of blocks and the traces of these, with intervals.

    ``of: blocks`` takes those of the section ``blocks``.
    """

    of: Grouping | Literal["blocks"] = "parameters"
    probes: Annotated[int, pydantic.Field(ge=4, le=100_000)] = 24
    sections: dict[str, Patterns] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check(self) -> CouplingsSection:
        if self.sections and self.of != "parameters":
            raise ValueError("sections cut parameters; ask for them with of: parameters")
        return self


@final
class AlertSection(Section):
    """An entry of ``alerts``: the fields of `disthess.audits.alerts.AlertRule`."""

    name: str
    metric: str
    block: str = ""
    above: Number | None = None
    below: Number | None = None
    against: Literal["baseline", "last"] | None = None
    count: int = 5
    rise: Number | None = None
    fall: Number | None = None
    significance: Share = 0.01
    learning_rate: Number | None = None


@final
class HookSection(Section):
    """``hook``: who is told of alerts: a command that gets JSON on its standard input, and a file that gets a line of it."""

    command: str | Annotated[list[str], pydantic.Field(min_length=1)] | None = None
    json_path: str | None = pydantic.Field(default=None, alias="json")


@final
class AuditConfig(Section):
    """One audit file. Without ``checkpoints`` the factory's own weights are audited."""

    problem: AuditedSection
    history: str
    checkpoints: CheckpointsSection | None = None
    measure: MeasureSection = MeasureSection()
    blocks: Grouping | dict[str, Patterns] | None = None
    couplings: CouplingsSection | None = None
    tiles: dict[str, Annotated[list[str], pydantic.Field(min_length=2, max_length=2)]] = pydantic.Field(
        default_factory=dict
    )
    alerts: list[AlertSection] = pydantic.Field(default_factory=list)
    hook: HookSection = HookSection()

    @pydantic.model_validator(mode="after")
    def _check(self) -> AuditConfig:
        names = [alert.name for alert in self.alerts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two alerts have the name {twice[0]!r}")
        if self.couplings is not None and self.couplings.of == "blocks" and self.blocks is None:
            raise ValueError("couplings are of blocks, and there is no section blocks")
        if DENSITY in (self.measure.block_metrics or ()) and self.blocks is None:
            raise ValueError(
                "measure.block_metrics names density, and there is no section blocks; add it, or leave it out"
            )
        return self

    def on_cluster(self, address: str) -> AuditConfig:
        """A copy whose products are taken by actors of the Ray cluster at an address."""
        measure = self.measure.model_copy(update={"executor": "ray", "address": address})
        return self.model_copy(update={"measure": measure})

    def source(self, path: str | Path) -> Source:
        """Where the problem comes from; ``path`` is the audit file's own."""
        return Source(self.problem.factory, self.problem.arguments, None, self.folders(path))

    def folders(self, path: str | Path) -> tuple[str, ...]:
        """Where relative paths of files are looked for: the current folder, then that of the audit file."""
        return (".", str(Path(path).resolve().parent))


def load_audit(path: str | Path) -> AuditConfig:
    """Read an audit file.

    Raises:
        ConfigError: The file does not exist, is not YAML, or holds an unknown key, a repeated key, or a value of the wrong kind;
            the message names the place.
    """
    return parse_audit(read_tree(path, "audit file", "configs/digits_audit.yaml"), str(Path(path)))


def parse_audit(tree: Any, place: str) -> AuditConfig:
    """Check a tree of dicts and lists, as from YAML; ``place`` is what messages call it.

    Raises:
        ConfigError: As for `load_audit`.

    >>> parse_audit({"problem": {"factory": "a:b"}, "history": "h.zarr"}, "here").measure.probes
    48
    """
    return check_tree(AuditConfig, tree, place, "problem, checkpoints, history and (if wanted) measure, blocks, alerts")


def is_audit(tree: Any) -> bool:
    """Whether a tree is of an audit file, right or wrong, and not of a run file.

    >>> is_audit({"history": "h.zarr"}), is_audit({"compute": {}})
    (True, False)
    """
    own = set(AuditConfig.model_fields) - {"problem"}
    return isinstance(tree, dict) and "compute" not in tree and bool(own & set(map(str, tree)))
