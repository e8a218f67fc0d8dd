"""What a store holds, as frozen values of integers and strings: no arrays, no zarr, no torch.

The words: a *parameter* is a tensor; a *use* is one (node, parameter) occurrence; a *panel* holds the rows of one
source against all its targets (itself first); a *tile* is a row range of everything one sweep of a source yields, and the
unit of task, retry and resume.

Panels are *upper*: a pair is stored once, in the panel of its earlier member. Inside the diagonal square of a panel the
same holds tile by tile: what lies left of a tile's first row is the transpose of an earlier tile. Whole chunks of it, up to column
``first_column(start)``, are never written, and the rest may be NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from disthess.types import DType, Part, Span

PanelKind = Literal["panels", "uses", "activations"]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter tensor, in the user's ``named_parameters()`` order.

    Attributes:
        name: As in ``named_parameters()``; the first name of a tie.
        aliases: The other names of the same tensor.
        shape: Its shape.
        rank: Position in topological order of first use (internal order of panels); unused parameters have the
            last ranks.
        uses: Names of its uses in topological order; empty if the objective does not reach it (its blocks are zero).
        weight_decay: What weight decay adds to the diagonal of its own block.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    rank: int
    uses: tuple[str, ...]
    weight_decay: float = 0.0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """One node whose activation Hessian is stored.

    Attributes:
        name: Name of the node.
        modules: Paths of the modules it is the (only) output of.
        shape: Shape of one sample's value; of the whole batch's where samples are coupled.
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """One stored 2-D array per part: rows of ``source`` against ``targets``, at ``{kind}/{part}/{index}``.

    Attributes:
        kind: ``panels`` (source and targets are parameters), ``uses`` (source and targets are uses) or ``activations`` (nodes).
        index: Number of the panel within its kind; names the array, so that any parameter name is allowed.
        source: Parameter, use or node name.
        rows: Number of rows, ``p_source``; of activations kept per sample, the node's size times the samples, entry-major.
        targets: (name, numel) of each target, in column order.
        row_chunk: Rows per chunk.
        column_chunk: Columns per chunk.
        diagonal: Whether the first target is the source itself, so that tiles are stored from ``first_column`` on.
        reduced: True where Dask writes this panel from ``uses`` panels after the tiles, instead of the tiles.
    """

    kind: PanelKind
    index: int
    source: str
    rows: int
    targets: tuple[tuple[str, int], ...]
    row_chunk: int
    column_chunk: int
    diagonal: bool
    reduced: bool = False

    @property
    def columns(self) -> int:
        """Number of columns, the sum of the targets' sizes."""
        return sum(size for _, size in self.targets)

    def first_column(self, start: int) -> int:
        """First stored column of the tile whose first row is ``start``: a chunk boundary at or before the diagonal.

        >>> PanelSpec("panels", 0, "w", 8, (("w", 8), ("b", 2)), 2, 4, True).first_column(6)
        4
        """
        return start // self.column_chunk * self.column_chunk if self.diagonal else 0

    def column_span(self, target: str) -> Span:
        """Columns of one target.

        Raises:
            KeyError: ``target`` is not among the targets.
        """
        offset = 0
        for name, size in self.targets:
            if name == target:
                return Span(offset, offset + size)
            offset += size
        raise KeyError(target)

    def path(self, part: Part) -> str:
        """Where the array lies inside the store."""
        return f"{self.kind}/{part}/{self.index}"


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows ``span`` of one source: one task.

    Attributes:
        index: Position in the ledger; also the order in the plan's tables.
        source: Name of the source: a parameter, or a use where uses are swept apart.
        span: Rows, a whole number of row chunks of every panel it writes (the last may be shorter).
        wave: Reverse topological level of the source; 0 is nearest the loss.
        owner: Worker that owns it, in ``range(workers)``. Not part of the store: results do not depend on it.
        flops: Projected floating point operations (2 per multiply-add).
        written_bytes: Bytes this tile writes.
        memory_bytes: Upper bound of what computing and writing it adds to the worker's memory.
    """

    index: int
    source: str
    span: Span
    wave: int
    owner: int
    flops: int
    written_bytes: int
    memory_bytes: int

    @property
    def place(self) -> str:
        """Source and rows, for people.

        >>> Tile(3, "fc1.weight", Span(64, 128), 0, 0, 1, 1, 1).place
        'fc1.weight, rows 64 to 127'
        """
        return f"{self.source}, rows {self.span.start} to {self.span.stop - 1}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything the driver creates before work starts.

    Attributes:
        parameters: In user order.
        panels: All arrays, both kinds.
        outputs: For each source name, which panels its tiles write: (kind, index) pairs.
        tiles: Row ranges, in ledger order; ``owner`` and the projections are left out of ``identity``.
        parts: Which parts are stored.
        dtype: Of every panel.
        activations: Nodes whose activation Hessian is stored, in topological order.
        activation_samples: Samples that their blocks are kept for one by one; 0 where the sums over samples are kept.
    """

    parameters: tuple[ParameterSpec, ...]
    panels: tuple[PanelSpec, ...]
    outputs: tuple[tuple[str, tuple[tuple[PanelKind, int], ...]], ...]
    tiles: tuple[Tile, ...]
    parts: tuple[Part, ...]
    dtype: DType
    activations: tuple[ActivationSpec, ...] = ()
    activation_samples: int = 0

    @property
    def numel(self) -> int:
        """``P``, the number of rows and columns of the Hessian."""
        return sum(parameter.numel for parameter in self.parameters)

    def panel(self, kind: PanelKind, index: int) -> PanelSpec:
        """The panel of that kind and number.

        Raises:
            KeyError: There is none.
        """
        for panel in self.panels:
            if panel.kind == kind and panel.index == index:
                return panel
        raise KeyError((kind, index))

    def panels_of(self, source: str) -> tuple[PanelSpec, ...]:
        """The panels that a tile of ``source`` writes (same order in every tile's result).

        Raises:
            KeyError: No tile has that source.
        """
        for name, keys in self.outputs:
            if name == source:
                return tuple(self.panel(kind, index) for kind, index in keys)
        raise KeyError(source)

    def decay(self, panel: PanelSpec, part: Part) -> float:
        """What weight decay adds to the diagonal of a panel's own square; nothing to the residual, nor to single uses."""
        if panel.kind != "panels" or part == "residual":
            return 0.0
        return next((p.weight_decay for p in self.parameters if p.name == panel.source), 0.0)


@dataclass(frozen=True, slots=True)
class TileRecord:
    """What a worker returns for a finished tile: a few bytes.

    Attributes:
        tile: Index of the tile.
        checksum: crc32c over the bytes of its arrays, part by part, panel by panel.
        seconds: Wall time of computing and writing it.
        written_bytes: Bytes written.
        peak_bytes: Peak rise of the worker's memory so far, above its level before the model was loaded (of a forked worker, above
            what it shares with its parent); 0 if unknown.
        worker: Number of the worker.
        split: How often the planned stack and microbatch were halved, because memory ran out; see `SourcePlan.halved`.
    """

    tile: int
    checksum: int
    seconds: float
    written_bytes: int
    peak_bytes: int
    worker: int
    split: int = 0


Attributes = dict[str, Any]
"""JSON values."""
