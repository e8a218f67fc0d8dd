"""The plan: what will be computed, by whom, in how many bytes, known before anything runs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from disthess.planning.source import SourcePlan
from disthess.store.disk import layout_disk_bytes
from disthess.store.layout import Layout, Tile
from disthess.units import human_bytes, human_flops, human_seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that has not started.

    Attributes:
        title: The problem in a line.
        layout: What the store will hold, and the tiles.
        sources: How each source is swept.
        method: ``graph`` or ``autograd``.
        method_reason: Why.
        sharing: ``none``, ``sum`` or ``uses``.
        independence: How independence of samples was decided.
        samples: Samples in all batches.
        batches: Number of batches.
        workers: Number of workers.
        threads: Threads per worker.
        device: Where workers compute.
        worker_bytes: Memory of a worker before its first tile.
        tile_product_flops: Of each tile's work, what is products of matrices and convolutions, 2 per multiply-add.
        not_checked: Of a problem without values, what could not be checked; else empty.
    """

    title: str
    layout: Layout
    sources: tuple[SourcePlan, ...]
    method: str
    method_reason: str
    sharing: str
    independence: str
    samples: int
    batches: int
    workers: int
    threads: int
    device: str
    worker_bytes: int
    tile_product_flops: tuple[int, ...]
    not_checked: str = ""

    @property
    def flops(self) -> int:
        """Projected floating point operations, 2 per multiply-add: `product_flops` and `entry_flops`."""
        return sum(tile.flops for tile in self.layout.tiles)

    @property
    def product_flops(self) -> int:
        """Those in products of matrices and convolutions: what `torch.utils.flop_counter` counts. Exact; 0 for autograd."""
        return sum(self.tile_product_flops)

    @property
    def entry_flops(self) -> int:
        """Those done entry by entry (sums, products and functions of entries), about. For autograd an estimate of all work."""
        return self.flops - self.product_flops

    @property
    def disk_bytes(self) -> int:
        """Projected bytes of the store's panels on disk: whole chunks, those that Dask writes included."""
        return layout_disk_bytes(self.layout)

    @property
    def peak_bytes(self) -> int:
        """Projected peak memory of one worker, above an idle process: its base and its largest tile."""
        return self.worker_bytes + max((tile.memory_bytes for tile in self.layout.tiles), default=0)

    @property
    def waves(self) -> int:
        """Number of waves."""
        return len({tile.wave for tile in self.layout.tiles})

    @property
    def worker_flops(self) -> tuple[int, ...]:
        """Projected floating point operations of the tiles that each worker owns."""
        load = [0] * self.workers
        for tile in self.layout.tiles:
            load[tile.owner] += tile.flops
        return tuple(load)

    @property
    def imbalance(self) -> float:
        """The busiest worker's operations over the mean of all workers: 1 is perfect. Idle workers take tiles of busy ones."""
        load = self.worker_flops
        return max(load) * len(load) / sum(load) if any(load) else 1.0

    def seconds(self, flops_per_second: float) -> float:
        """Projected seconds of the busiest worker's matrix products at a given rate of one worker: it takes longer."""
        load = Counter[int]()
        for tile, product_flops in zip(self.layout.tiles, self.tile_product_flops, strict=True):
            load[tile.owner] += tile.flops if self.method == "autograd" else product_flops
        return max(load.values(), default=0) / flops_per_second

    def describe(self, limit_rows: int = 12, flops_per_second: float | None = None, rate: str = "measured here") -> str:
        """The plan as text: totals, then one line per source (the dearest first, at most ``limit_rows``).

        Args:
            limit_rows: Most lines of sources.
            flops_per_second: Rate of one worker's matrix products; with it the time is projected.
            rate: Where that rate comes from, in words.
        """
        layout = self.layout
        item = 4 if layout.dtype == "float32" else 8
        lines = [
            f"problem       {self.title}",
            f"parameters    P = {layout.numel:,} in {len(layout.parameters)} tensors; samples {self.samples:,} in "
            f"{self.batches} batch{'es' if self.batches != 1 else ''}",
            f"samples       {self.independence}",
            f"method        {self.method}: {self.method_reason}",
            f"stored        {', '.join(layout.parts)} as {layout.dtype}, each pair once: {human_bytes(self.disk_bytes)} on disk "
            f"(both triangles would be {human_bytes(layout.numel**2 * item * len(layout.parts))})",
            f"work          {len(layout.tiles):,} tile{'s' if len(layout.tiles) != 1 else ''} in {self.waves} "
            f"wave{'s' if self.waves != 1 else ''}, {self._describe_work()}",
            f"workers       {self.workers} x {self.threads} thread{'s' if self.threads != 1 else ''} on {self.device}; peak memory "
            f"per worker at most {human_bytes(self.peak_bytes)} above an idle process",
        ]
        if self.workers > 1:
            lines.append(f"imbalance     the busiest worker has {self.imbalance:.3f} times the mean work")
        if flops_per_second:
            lines.append(
                f"time          at least {human_seconds(self.seconds(flops_per_second))}: the busiest worker's matrix products at "
                f"{human_flops(flops_per_second)}/s per worker, {rate}"
            )
        if self.not_checked:
            lines.append(f"not checked   {self.not_checked}")
        if self.sharing != "none":
            lines.append(f"sharing       {self.sharing}: " + _SHARING[self.sharing])
        unused = [parameter.name for parameter in layout.parameters if not parameter.uses]
        if unused:
            shown = ", ".join(unused[:_NAMES]) + (f" and {len(unused) - _NAMES} more" if len(unused) > _NAMES else "")
            lines.append(f"unreached     the objective does not depend on {shown}: zero blocks")
        return "\n".join([*lines, "", *self._source_table(limit_rows)])

    def _describe_work(self) -> str:
        if self.method == "autograd":
            return f"about {human_flops(self.flops)} (an estimate: what autograd does is not counted)"
        return f"{human_flops(self.product_flops)} in matrix products and about {human_flops(self.entry_flops)} entry by entry"

    def _source_table(self, limit: int) -> list[str]:
        by_source: dict[str, list[Tile]] = {}
        for tile in self.layout.tiles:
            by_source.setdefault(tile.source, []).append(tile)
        rows = []
        for source in self.sources:
            tiles = by_source.get(source.source, [])
            rows.append((sum(tile.flops for tile in tiles), source, tiles))
        rows.sort(key=lambda row: -row[0])
        width = max([len(source.source) for _, source, _ in rows[:limit]] + [6])
        lines = [f"{'source':<{width}}  {'rows':>9}  tiles  wave  {'basis':<9}  stack  {'work':>12}  {'written':>10}"]
        for flops, source, tiles in rows[:limit]:
            last = max((tile.span.stop for tile in tiles), default=0)
            lines.append(
                f"{source.source:<{width}}  {last:>9,}  {len(tiles):>5}  {tiles[0].wave if tiles else 0:>4}  {source.basis:<9}  "
                f"{source.stack:>5}  {human_flops(flops):>12}  {human_bytes(sum(t.written_bytes for t in tiles)):>10}"
            )
        if len(rows) > limit:
            lines.append(f"... and {len(rows) - limit} more sources")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        tiles = [
            {**{f.name: getattr(tile, f.name) for f in dataclasses.fields(tile) if f.name != "span"},
             "start": tile.span.start, "stop": tile.span.stop}
            for tile in self.layout.tiles
        ]  # fmt: skip
        return {
            "title": self.title,
            "parameters": [dataclasses.asdict(parameter) for parameter in self.layout.parameters],
            "numel": self.layout.numel,
            "parts": list(self.layout.parts),
            "dtype": self.layout.dtype,
            "method": self.method,
            "method_reason": self.method_reason,
            "sharing": self.sharing,
            "independence": self.independence,
            "samples": self.samples,
            "batches": self.batches,
            "workers": self.workers,
            "threads": self.threads,
            "device": self.device,
            "flops": self.flops,
            "product_flops": self.product_flops,
            "entry_flops": self.entry_flops,
            "disk_bytes": self.disk_bytes,
            "worker_bytes": self.worker_bytes,
            "peak_bytes": self.peak_bytes,
            "waves": self.waves,
            "imbalance": self.imbalance,
            "not_checked": self.not_checked,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "tiles": tiles,
        }


_NAMES = 12
"""Most names in one line."""

_SHARING = {
    "uses": "each use of a shared parameter is stored apart, Dask sums them",
    "sum": "all uses of a shared parameter are swept at once",
}
