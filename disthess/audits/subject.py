"""What an audit file asks of a problem, once its names are looked up: the same for every checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from disthess.audit_config import AuditConfig
from disthess.audits.meter import Part
from disthess.audits.metrics import METRICS
from disthess.blocks import find_blocks
from disthess.errors import ConfigError
from disthess.linalg.block_map import Places
from disthess.linalg.estimate import WHOLE
from disthess.linalg.quadrature import POINTS
from disthess.linalg.summary import DENSE, DENSITY, SUMMARY, ends_open, summary_bytes, summary_products
from disthess.preflight import check_dtype, check_parameters
from disthess.prepare import select_parameters
from disthess.problem import Parameter, Problem
from disthess.store.audit_group import MOST_ENTRY_BYTES
from disthess.units import human_bytes

TILE_ENTRIES = 1 << 24
"""Largest exact block."""

TILE_PRODUCTS = 4096
"""Most products for one: its smaller side."""

STOPPING = ("scaled_gradient", "newton_decrement", "stop")
"""Metrics that come from one Krylov space of the gradient."""

GGN, COUPLINGS, KRYLOV = "GGN share", "couplings", "stopping criteria"
"""Parts of an audit that take products, beside summaries and exact blocks."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A problem with what is to be found of it.

    Attributes:
        problem: The factory's; checkpoints are loaded into it.
        config: The audit file.
        names: Parameters audited, first names.
        size: Their entries, P.
        metrics: Of the whole model.
        block_metrics: Of the blocks.
        blocks: Places of their entries by name.
        coupled: The same of the blocks of the coupling map.
        tiles: Places of the rows and columns of each exact block.
    """

    problem: Problem
    config: AuditConfig
    names: tuple[str, ...]
    size: int
    metrics: tuple[str, ...]
    block_metrics: tuple[str, ...]
    blocks: Mapping[str, Places]
    coupled: Mapping[str, Places]
    tiles: Mapping[str, tuple[Places, Places]]

    def bound(self) -> Problem:
        """A copy of the problem as it is now, in the dtype and on the device of the audit."""
        wanted = self.config.measure.dtype
        dtype = self.problem.dtype if wanted is None else torch.float64 if wanted == "float64" else torch.float32
        return self.problem.to(dtype, self.config.measure.device)

    def parts(self) -> tuple[Part, ...]:
        """Products of one checkpoint by what they are for, at most."""
        found = _summary_parts(WHOLE, self.size, self.summary_metrics(), self.config)
        section = self.config.measure
        if "ggn_share" in self.metrics:
            dense = next((part.products for part in found if part.name.endswith("dense")), 0)
            found.append(Part(GGN, dense or 2 * (section.probes // 3)))
        if set(STOPPING) & set(self.metrics):
            found.append(Part(KRYLOV, self.krylov_products()))
        for name, places in self.blocks.items():
            found += _summary_parts(name, entries(places, self.size), self.block_metrics, self.config)
        if self.config.couplings is not None:
            probes = self.config.couplings.probes
            sizes = [entries(places, self.size) for places in self.coupled.values()]
            found.append(Part(COUPLINGS, sum(min(probes, size) for size in sizes)))
        for name, (rows, columns) in self.tiles.items():
            found.append(Part(f"exact block {name}", min(entries(rows, self.size), entries(columns, self.size))))
        return tuple(found)

    def summary_metrics(self) -> tuple[str, ...]:
        """What the summary of the whole has to find for ``metrics``."""
        wanted = [metric for metric in SUMMARY if metric in self.metrics]
        if "rate_limit" in self.metrics or set(STOPPING) & set(self.metrics):
            wanted += ["lambda_max", "lambda_min"]
        if "ggn_share" in self.metrics:
            wanted += ["trace"]
        return tuple(dict.fromkeys(wanted))

    def krylov_products(self) -> int:
        """Vectors of the gradient's Krylov space: as many as were asked for and memory holds twice, eight at least."""
        section = self.config.measure
        fit = int(section.memory_gib * 2**30) // (24 * self.size)
        return min(section.krylov, self.size, max(8, fit))

    def vector_bytes(self) -> int:
        """Memory for vectors at most, beside the operator's own."""
        effort = self.config.measure.effort()
        found = [summary_bytes(self.size, effort, self.summary_metrics())]
        found += [
            summary_bytes(entries(places, self.size), effort, self.block_metrics) + 16 * 8 * self.size
            for places in self.blocks.values()
        ]
        if set(STOPPING) & set(self.metrics):
            found.append(24 * self.krylov_products() * self.size)
        if self.config.couplings is not None:
            found.append(3 * self.config.couplings.probes * self.size * 8)
        tiles = [entries(rows, self.size) * entries(columns, self.size) * 8 for rows, columns in self.tiles.values()]
        return max(found) + sum(tiles)

    def array_bytes(self) -> int:
        """Of the arrays that an audit of a checkpoint keeps."""
        curves = len(self.blocks) if DENSITY in self.block_metrics else 0
        curves += DENSITY in self.metrics
        tiles = sum(entries(rows, self.size) * entries(columns, self.size) for rows, columns in self.tiles.values())
        # Of a map norms and couplings of pairs and traces of blocks, each with the ends of its interval.
        pairs = 2 * len(self.coupled) ** 2 + len(self.coupled)
        return 8 * (3 * POINTS * curves + 3 * pairs + tiles)


def entries(places: Places, size: int) -> int:
    """How many entries a block has."""
    return len(range(size)[places]) if isinstance(places, slice) else len(places)


def make_subject(problem: Problem, config: AuditConfig) -> Subject:
    """Look up every name of an audit file.

    Raises:
        ConfigError: A name, pattern or metric matches nothing; an exact block, or all that is kept of an audit, is too large; or
            a density could have no error.
        ProblemError: The model has no usable parameters.
    """
    check_parameters(problem)
    section = config.measure
    check_dtype(problem, section.dtype)
    if torch.device(section.device).type not in ("cpu", "cuda"):
        raise ConfigError(f"measure.device is {section.device!r}; it must be cpu or cuda.")
    names = select_parameters(problem, section.parameters)
    chosen = [parameter for parameter in problem.parameters() if parameter.name in names]
    size = sum(parameter.tensor.numel() for parameter in chosen)
    blocks = {} if config.blocks is None else find_blocks(problem.model, chosen, config.blocks)
    tiles = {name: _tile(problem, chosen, name, sides, size) for name, sides in config.tiles.items()}
    found = Subject(
        problem=problem,
        config=config,
        names=names,
        size=size,
        metrics=_metrics(section.metrics, "metrics", [*METRICS, DENSITY]),
        block_metrics=_block_metrics(section.block_metrics),
        blocks=blocks,
        coupled=_coupled(problem, chosen, config, blocks),
        tiles=tiles,
    )
    _check_densities(found)
    if found.array_bytes() > MOST_ENTRY_BYTES:
        raise ConfigError(
            f"the arrays of one audit would take {human_bytes(found.array_bytes())}, and a history keeps at most "
            f"{human_bytes(MOST_ENTRY_BYTES)} of each. Ask for fewer blocks, or leave out couplings, exact blocks or densities."
        )
    return found


def _block_metrics(given: Sequence[str] | None) -> tuple[str, ...]:
    """The density of blocks only where it is named: a curve for each of many blocks is no small thing to keep."""
    numbers = [name for name, metric in METRICS.items() if metric.per_block]
    return tuple(numbers) if given is None else _metrics(given, "block_metrics", [*numbers, DENSITY])


def _check_densities(subject: Subject) -> None:
    section = subject.config.measure
    if DENSITY not in subject.block_metrics or section.density_probes > 1:
        return
    formed = max(DENSE, section.probes)
    for name, places in subject.blocks.items():
        if (size := entries(places, subject.size)) > formed:
            raise ConfigError(
                f"measure.block_metrics names density, and the block {name!r} has {size:,} entries, more than the {formed} up to "
                f"which it is exact. With measure.density_probes 1 there is no scatter to make its error of: give 2 at least."
            )


def _metrics(given: Sequence[str] | None, key: str, allowed: Sequence[str]) -> tuple[str, ...]:
    for name in given or ():
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ConfigError(f"measure.{key} names {name!r}{hint}; allowed there are {', '.join(allowed)}.")
    return tuple(name for name in allowed if given is None or name in given)


def _coupled(
    problem: Problem, chosen: Sequence[Parameter], config: AuditConfig, blocks: Mapping[str, Places]
) -> Mapping[str, Places]:
    section = config.couplings
    if section is None:
        return {}
    if section.of == "blocks":
        return blocks
    found = find_blocks(problem.model, chosen, section.of)
    if not section.sections:
        return found
    cut = find_blocks(problem.model, chosen, section.sections)
    taken = np.zeros(sum(parameter.tensor.numel() for parameter in chosen), dtype=bool)
    for name, places in cut.items():
        if taken[places].any():
            raise ConfigError(f"couplings.sections: {name!r} has entries of another section; let them be apart.")
        taken[places] = True
    # What of a parameter is in no section stays a block under the parameter's name.
    kept = {name: _array(places)[~taken[places]] for name, places in found.items()}
    return {**{name: places for name, places in kept.items() if len(places)}, **cut}


def _array(places: Places) -> np.ndarray:
    return np.arange(places.start, places.stop) if isinstance(places, slice) else places


def _tile(
    problem: Problem, chosen: Sequence[Parameter], name: str, sides: Sequence[str], size: int
) -> tuple[Places, Places]:
    rows, columns = (find_blocks(problem.model, chosen, {f"{name}": [side]})[name] for side in sides)
    high, wide = entries(rows, size), entries(columns, size)
    if high * wide > TILE_ENTRIES or min(high, wide) > TILE_PRODUCTS:
        raise ConfigError(
            f"the tile {name!r} is {high:,} x {wide:,}, {human_bytes(high * wide * 8)}, and takes {min(high, wide):,} products; at "
            f"most {TILE_ENTRIES:,} entries and {TILE_PRODUCTS:,} products are allowed in an audit. Choose ranges of rows, such as "
            f"{sides[0].partition('[')[0]}[0:8]."
        )
    return rows, columns


def _summary_parts(block: str, size: int, metrics: Sequence[str], config: AuditConfig) -> list[Part]:
    effort = config.measure.effort()
    return [
        Part(part_name(block, part), count, until_converged=part == "ends" and ends_open(size, effort))
        for part, count in summary_products(size, effort, metrics).items()
    ]


def part_name(block: str, part: str) -> str:
    """What a part of a summary is called."""
    titles = {"dense": "whole matrix", "moments": "trace and norm", "ends": "extreme eigenvalues", "density": "density"}
    return f"{block or 'model'}: {titles[part]}"
