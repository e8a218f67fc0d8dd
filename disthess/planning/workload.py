"""What the planner is told of a problem: names and integers."""

from __future__ import annotations

from dataclasses import dataclass

from disthess.planning.source import Basis
from disthess.planning.work import SweepWork
from disthess.store.layout import ActivationSpec, ParameterSpec


@dataclass(frozen=True, slots=True)
class SourceCost:
    """Costs of sweeping one source. COST.md beside this file says what is counted.

    Matrix products are counted apart, exactly, in ``sweeps``. The other costs are multiply-adds entry by entry, per tangent and
    sample; of ``method="autograd"``, which sweeps no graph, ``propagation`` is an estimate of everything.

    Attributes:
        source: Parameter name; or use name where it stands for one use of a shared parameter.
        parameter: Its parameter.
        uses: The uses it starts from.
        level: Longest path to the loss.
        rows: ``p_source``.
        units: Output units, 0 where there is no output basis; entries of an activation.
        unit_rows: Inputs of the layer (rows per output unit), 0 where there is no output basis; of an activation, samples that
            its rows are kept for.
        unit_tangents: Tangents that an output unit takes: rows of one sample at the output, or places that they are pooled to.
        propagation: Forward pass and reverse wave, without what is done at target leaves.
        summed_targets: Cotangents of all target leaves, summed over samples (parameter basis).
        apart_targets: Per-sample rows of all target leaves (output basis).
        columns: Entries of all target leaves.
        diagonal: Whether the source's own block is symmetric in its inputs (half of the products).
        tangent_entries: Entries of all tangents kept.
        front_entries: Entries of the largest single tangent.
        apart_entries: Entries of per-sample rows that are held whole (through reshaped weights).
        sweeps: Matrix products of a sweep by basis, one for each of the problem's graphs.
        table_width: Entries of a row, where the source is a table (an embedding's weight) of which a sample reads some rows
            only; else 0.
        readers: Of a table, for each batch how many samples read each row.
        kept_entries: Entries of cotangents that are kept to a wave's end, of targets with several uses (output basis).
    """

    source: str
    parameter: str
    uses: tuple[str, ...]
    level: int
    rows: int
    units: int
    unit_rows: int
    unit_tangents: int
    propagation: int
    summed_targets: int
    apart_targets: int
    columns: int
    diagonal: bool
    tangent_entries: int
    front_entries: int
    apart_entries: int
    sweeps: tuple[tuple[Basis, tuple[SweepWork, ...]], ...] = ()
    table_width: int = 0
    readers: tuple[tuple[int, ...], ...] = ()
    kept_entries: int = 0

    @property
    def pooled(self) -> bool:
        """Whether rows of its output are pooled to fewer before tangents start (output basis)."""
        works = [work for basis, found in self.sweeps if basis == "output" for work in found]
        return any(work.layer_rows > work.rows for work in works)

    @property
    def apart(self) -> int:
        """Rows of a sample that are taken for samples of their own (output basis), the most on any graph."""
        return max((work.apart for basis, found in self.sweeps if basis == "output" for work in found), default=1)

    def sweep(self, basis: Basis, graph: int) -> SweepWork | None:
        """Matrix products of a sweep on one of the graphs, or None where they were not counted."""
        return next((found[graph] for name, found in self.sweeps if name == basis), None)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One batch as a sweep sees it.

    Attributes:
        graph: Which of the problem's graphs it runs on.
        samples: Samples told apart.
        size: Of coupled samples, how many there are,
        captured: and how many there were when its graph was captured: the work is taken to be in proportion.
    """

    graph: int
    samples: int
    size: int = 1
    captured: int = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """A captured problem in integers.

    Attributes:
        title: One line that names the model and the objective.
        parameters: Those selected, in user order.
        sources: Cost of every parameter as a source, all uses together, by rank.
        use_sources: Cost of every use of a shared parameter as a source.
        samples: Samples told apart, over all batches (a coupled batch counts as one).
        largest_batch: Samples of the largest batch.
        batches: Number of batches.
        data_samples: Samples as the user counts them.
        independent: Whether samples are independent.
        why: How that was decided.
        model_bytes: Parameters, buffers and batches on one worker.
        primal_bytes: Values and deltas of every node on all batches.
        dtype_bytes: Bytes per number.
        activations: Nodes whose activation blocks are asked for.
        activation_sources: Cost of each of them as a source.
        activation_samples: Samples their blocks are kept for one by one, or 0.
        runs: Every batch; empty where only totals are known.
    """

    title: str
    parameters: tuple[ParameterSpec, ...]
    sources: tuple[SourceCost, ...]
    use_sources: tuple[SourceCost, ...]
    samples: int
    largest_batch: int
    batches: int
    data_samples: int
    independent: bool
    why: str
    model_bytes: int
    primal_bytes: int
    dtype_bytes: int
    activations: tuple[ActivationSpec, ...] = ()
    activation_sources: tuple[SourceCost, ...] = ()
    activation_samples: int = 0
    runs: tuple[BatchRun, ...] = ()

    def batch_runs(self) -> tuple[BatchRun, ...]:
        """Every batch; where only totals are known, as many of the largest size as there can be."""
        if self.runs:
            return self.runs
        sizes, left = [], self.samples
        for after in reversed(range(self.batches)):
            sizes.append(max(1, min(self.largest_batch, left - after)))
            left -= sizes[-1]
        return tuple(BatchRun(0, size) for size in sizes)
