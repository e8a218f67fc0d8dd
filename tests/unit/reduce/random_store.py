"""A store of a random symmetric matrix: the matrix is made per use first, so that sums over uses have a dense oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disthess.store.layout import Layout, PanelKind, PanelSpec, ParameterSpec, Tile, TileRecord
from disthess.store.store import Store
from disthess.types import Part, Span


@dataclass(frozen=True, slots=True)
class Shape:
    """One parameter: how many entries, and at which places of the topological order it is used (none: not reached)."""

    name: str
    numel: int
    places: tuple[int, ...]


TIED = (
    Shape("bias", 3, (4,)),
    Shape("tied", 17, (0, 2, 5)),
    Shape("lost", 4, ()),
    Shape("early", 6, (1,)),
    Shape("late", 11, (3, 6)),
)
"""Two shared parameters, two with one use, one that is not reached; the user's order is not the topological one."""

PLAIN = (Shape("b", 5, (2,)), Shape("w", 23, (0,)), Shape("lost", 2, ()), Shape("v", 9, (1,)))


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunk shapes: of panels swept, and of panels summed from uses."""

    rows: int = 4
    columns: int = 5
    tile_chunks: int = 2
    summed_rows: int = 6
    summed_columns: int = 7


@dataclass(frozen=True, slots=True)
class Made:
    """A store and what it should hold, dense, in the user's order, by part."""

    store: Store
    dense: dict[Part, np.ndarray]


def make_layout(shapes: Sequence[Shape], chunks: Chunks, parts: tuple[Part, ...], dtype: str = "float64") -> Layout:
    """Panels as a planner lays them out where uses are swept apart."""
    reached = sorted((shape for shape in shapes if shape.places), key=lambda shape: shape.places[0])
    ranks = {shape.name: rank for rank, shape in enumerate([*reached, *(s for s in shapes if not s.places)])}
    parameters = tuple(
        ParameterSpec(s.name, (f"{s.name}.alias",), (s.numel,), ranks[s.name], tuple(f"{s.name}@{p}" for p in s.places))
        for s in shapes
    )
    placed = sorted(((place, shape) for shape in shapes for place in shape.places), key=lambda pair: pair[0])
    uses = [(f"{shape.name}@{place}", shape) for place, shape in placed]
    panels: list[PanelSpec] = []
    outputs: list[tuple[str, tuple[tuple[PanelKind, int], ...]]] = []
    sizes: dict[str, int] = {}

    def add(
        kind: PanelKind, source: Shape, name: str, targets: Sequence[tuple[str, int]], diagonal: bool, summed: bool
    ) -> tuple[PanelKind, int]:
        index = sum(panel.kind == kind for panel in panels)
        rows, columns = (chunks.summed_rows, chunks.summed_columns) if summed else (chunks.rows, chunks.columns)
        whole = sum(size for _, size in targets)
        panels.append(
            PanelSpec(
                kind,
                index,
                name,
                source.numel,
                tuple(targets),
                min(rows, source.numel),
                min(columns, whole),
                diagonal,
                summed,
            )
        )
        return kind, index

    for rank, shape in enumerate(reached):
        later = [(other.name, other.numel) for other in reached[rank:]]
        if len(shape.places) > 1:
            add("panels", shape, shape.name, later, True, True)
            continue
        keys = [add("panels", shape, shape.name, later, True, False)]
        shared = [(f"{s.name}@{p}", s.numel) for p, s in placed if len(s.places) > 1 and p > shape.places[0]]
        if shared:
            keys.append(add("uses", shape, f"{shape.name}@{shape.places[0]}", shared, False, False))
        outputs.append((shape.name, tuple(keys)))
        sizes[shape.name] = shape.numel
    for position, (name, shape) in enumerate(uses):
        if len(shape.places) > 1:
            later = [(n, s.numel) for n, s in uses[position:]]
            outputs.append((name, (add("uses", shape, name, later, True, False),)))
            sizes[name] = shape.numel
    tiles: list[Tile] = []
    for source, rows in sizes.items():
        step = chunks.rows * chunks.tile_chunks if chunks.rows < rows else rows
        tiles += [
            Tile(len(tiles) + i, source, Span(start, min(start + step, rows)), 0, 0, 1, 1, 1)
            for i, start in enumerate(range(0, rows, step))
        ]
    return Layout(parameters, tuple(panels), tuple(outputs), tuple(tiles), parts, dtype)  # type: ignore[arg-type]


def make_store(
    place: Path,
    shapes: Sequence[Shape] = TIED,
    chunks: Chunks = Chunks(),
    parts: tuple[Part, ...] = ("hessian", "ggn"),
    dtype: str = "float64",
    seed: int = 0,
    skip: Sequence[int] = (),
) -> Made:
    """A store whose tiles are written and marked, but for ``skip``; nothing is summed yet."""
    layout = make_layout(shapes, chunks, parts, dtype)
    store = Store.create(place, layout, {"fingerprint": {}})
    names = [use for parameter in layout.parameters for use in parameter.uses]
    numel = {use: parameter.numel for parameter in layout.parameters for use in parameter.uses}
    starts = dict(zip(names, np.cumsum([0, *(numel[name] for name in names)])[:-1].tolist()))
    by_use = {
        part: _symmetric(sum(numel.values()), np.random.default_rng([seed, i]))
        for i, part in enumerate(("hessian", "ggn"))
    }
    by_use["residual"] = by_use["hessian"] - by_use["ggn"]
    gather = _gather(layout, starts)
    dense: dict[Part, np.ndarray] = {part: gather.T @ matrix @ gather for part, matrix in by_use.items()}  # type: ignore[misc]
    offsets = dict(
        zip((p.name for p in layout.parameters), np.cumsum([0, *(p.numel for p in layout.parameters)])[:-1].tolist())
    )

    def columns(panel: PanelSpec) -> tuple[np.ndarray, np.ndarray]:
        where = starts if panel.kind == "uses" else offsets
        return np.arange(panel.rows) + where[panel.source], np.concatenate(
            [np.arange(size) + where[name] for name, size in panel.targets]
        )

    for tile in layout.tiles:
        if tile.index in skip:
            continue
        arrays: dict[Part, list[np.ndarray]] = {part: [] for part in parts}
        for part in parts:
            for panel in layout.panels_of(tile.source):
                matrix = (by_use if panel.kind == "uses" else dense)[part]  # type: ignore[index]
                down, across = columns(panel)
                values = matrix[
                    np.ix_(down[tile.span.start : tile.span.stop], across[panel.first_column(tile.span.start) :])
                ]
                arrays[part].append(np.ascontiguousarray(values, dtype=dtype))
        checksum, written = store.write_tile(tile, arrays)
        store.mark([TileRecord(tile.index, checksum, 0.1, written, 0, 0)])
    return Made(store, dense)


def _symmetric(size: int, generator: np.random.Generator) -> np.ndarray:
    values = generator.standard_normal((size, size))
    return values + values.T


def _gather(layout: Layout, starts: dict[str, int]) -> np.ndarray:
    """``[uses, P]``: one where an entry of a use is an entry of a parameter."""
    total = sum(p.numel * len(p.uses) for p in layout.parameters)
    found = np.zeros((total, layout.numel))
    offset = 0
    for parameter in layout.parameters:
        for use in parameter.uses:
            entries = np.arange(parameter.numel)
            found[starts[use] + entries, offset + entries] = 1.0
        offset += parameter.numel
    return found
