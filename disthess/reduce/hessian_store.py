"""What users hold: a store, asked for blocks, for the whole matrix, or for products with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import dask.array as da
import numpy as np
import psutil
from scipy.sparse.linalg import LinearOperator

from disthess.errors import ConfigError, StoreError
from disthess.linalg.operator import AbstractSymmetricOperator, to_scipy
from disthess.reduce.activations import ActivationBlocks, ActivationReader
from disthess.reduce.arrays import PanelReader, lazy_block, lazy_matrix
from disthess.reduce.certify import Certificate, certificate_of
from disthess.reduce.norms import BlockTable, block_table
from disthess.reduce.operator import StoreOperator
from disthess.reduce.pairs import PairOf, PairTable, ParameterBlocks, pair_table
from disthess.reduce.places import ParameterPlaces, places_by_parameter, read_places
from disthess.reduce.sections import SectionBlocks, Sections, section_block
from disthess.reduce.uses import UseReader
from disthess.store.layout import ActivationSpec, Layout, ParameterSpec
from disthess.store.store import Store
from disthess.types import DType, Part


@final
class HessianStore:
    """A Hessian on disk. ``disthess.compute`` and ``disthess.open_store`` give one.

    Everything is in the objective's own scale (``1/N`` if the objective is a mean), in ``named_parameters()`` order, each
    parameter flattened row-major.

    Args:
        store: The raw store.
        fill: Computes the missing tiles of the panels of these parameters, where the problem is at hand.
    """

    def __init__(self, store: Store, fill: Callable[[Sequence[str]], None] | None = None) -> None:
        self.store = store
        self._fill = fill

    def __repr__(self) -> str:
        missing = len(self.missing_tiles())
        state = "complete" if not missing else f"{missing} of {len(self.layout.tiles)} tiles missing"
        return f"HessianStore({self.path!r}, P={self.numel:,}, parts={list(self.parts)}, {self.layout.dtype}, {state})"

    @property
    def path(self) -> str:
        """Where it is."""
        return self.store.path

    @property
    def layout(self) -> Layout:
        """What it holds, as a value."""
        return self.store.layout

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """Parameters in user order."""
        return self.layout.parameters

    @property
    def numel(self) -> int:
        """``P``."""
        return self.layout.numel

    @property
    def parts(self) -> tuple[Part, ...]:
        """Stored parts."""
        return self.layout.parts

    @property
    def attributes(self) -> dict[str, Any]:
        """Schema, versions, fingerprint, and how it was computed."""
        return self.store.attributes

    @property
    def gradient(self) -> np.ndarray:
        """``dL/dtheta``, ``[P]``."""
        return self.store.gradient()

    @property
    def loss(self) -> float:
        """``L``."""
        return self.store.loss()

    def missing_tiles(self) -> tuple[int, ...]:
        """Numbers of the tiles that are not done."""
        return self.store.missing_tiles()

    def block(self, a: str, b: str, part: Part = "hessian", lazy: bool = False) -> Any:
        """``d2 L / d a d b``.

        Args:
            a: Parameter of the rows; or a named section, or ranges written out, ``weight[0:64]`` or ``weight[:, 64:128]``.
            b: Parameter of the columns, likewise.
            part: ``hessian``, ``ggn`` or ``residual``.
            lazy: Return a Dask array instead of reading now.

        Returns:
            ``[numel of a, numel of b]``, numpy or Dask.

        Raises:
            UnknownNameError: No such parameter or section; near names are offered.
            ConfigError: Ranges are no ranges, or outside the parameter's shape.
            StoreError: The part is not stored, tiles of the block are missing, or a chunk is damaged.
        """
        reader = PanelReader(self.store, part)
        finder = Sections(self.parameters, self.sections)
        first, second = finder.find(a), finder.find(b)
        if first.is_whole and second.is_whole:
            found = lazy_block(reader, first.parameter, second.parameter)
        else:
            found = section_block(reader, first, second)
        return found if lazy else np.asarray(found.compute(scheduler="threads"))

    def read(self, rows: Any, cols: Any, part: Part = "hessian", *, compute: bool = False) -> np.ndarray:
        """Entries ``H[rows, cols]``.

        Args:
            rows: A slice, range or number in ``range(P)``; a parameter or section, as for `block`; or such a text and a slice of
                its entries, ``("fc1.weight", slice(0, 1024))``.
            cols: Likewise.
            part: ``hessian``, ``ggn`` or ``residual``.
            compute: Compute the missing tiles of the panels that hold them; for a store opened with its problem.

        Returns:
            ``[rows, cols]``.

        Raises:
            UnknownNameError: No such parameter or section; near names are offered.
            ConfigError: Rows or columns are none; or there is something to compute, and no problem.
            StoreError: The part is not stored, tiles are missing and ``compute`` is False, or a chunk is damaged.
            DisthessError: As `disthess.compute`, where it computes.
        """
        top, left = (places_by_parameter(self.parameters, asked, self.sections) for asked in (rows, cols))
        if compute:
            self._complete(top, left, part)
        reader = PanelReader(self.store, part)
        return np.block([[read_places(reader, a, b) for b in left] for a in top])

    def _complete(self, top: Sequence[ParameterPlaces], left: Sequence[ParameterPlaces], part: Part) -> None:
        reader = PanelReader(self.store, part)
        pairs = [sorted((a.parameter, b.parameter), key=lambda entry: entry.rank) for a in top for b in left]
        sources = {first.name for first, second in pairs if reader.ordered(first, second) is not None}
        lacking = sorted(source for source in sources if not reader.is_whole(source))
        if lacking and self._fill is None:
            raise ConfigError(
                f"computing the missing tiles of {self.path} needs the problem: open it by disthess.open_store(path, problem), or "
                f"give --config on the command line."
            )
        if lacking and self._fill is not None:
            self._fill(lacking)

    @property
    def kinks(self) -> list[dict[str, Any]] | None:
        """Nodes whose input sits at a kink or tie, with how many entries and samples and what torch takes there.

        Empty where there are none; None where nobody looked (the model was not captured, or the run is not finished).
        """
        found: list[dict[str, Any]] | None = self.store.attributes.get("kinks")
        return found

    @property
    def sections(self) -> dict[str, str]:
        """Named ranges of parameters, as they were given to ``compute``."""
        return dict(self.attributes.get("sections", {}))

    def pairs(
        self,
        part: Part = "hessian",
        of: PairOf = "parameters",
        progress: Callable[[int, int], None] | None = None,
    ) -> PairTable:
        """Norm, coupling, stable rank, gap to Gauss-Newton and trace of every pair of blocks.

        Args:
            part: Whose blocks.
            of: ``parameters``, ``activations``, or ``sections`` (parameters, those with named sections cut into these).
            progress: Called with (pairs done, pairs in all).

        Returns:
            A table; ``table.matrix("coupling")``, ``table.to_csv()``.

        Raises:
            ConfigError: ``of`` is none of the three.
            StoreError: There are no activations or sections, the part is not stored, or tiles are missing.
        """
        if of == "parameters":
            return pair_table(ParameterBlocks(self.store), part, of, progress)
        if of == "activations":
            return pair_table(ActivationBlocks(self.store), part, of, progress)
        if of != "sections":
            raise ConfigError(f"of must be parameters, activations or sections, got {of!r}.")
        if not self.sections:
            raise StoreError(
                f"the store {self.path} has no named sections. Give compute sections={{'q': 'in_proj_weight[0:64]', ...}}; on a "
                "store that is done this only adds the names."
            )
        return pair_table(SectionBlocks(self.store, self.sections), part, of, progress)

    def uses(self) -> tuple[str, ...]:
        """Names of all uses, ``parameter@node``, in topological order within each parameter."""
        return tuple(use for parameter in self.parameters for use in parameter.uses)

    def use_block(self, a: str, b: str, part: Part = "hessian") -> np.ndarray:
        """``H_ab``: the share of two single uses in the blocks of their parameters.

        The block of parameters is the sum over all pairs of their uses; a pair of uses at two places is what ties them.

        Args:
            a: Use of the rows, ``parameter@node``.
            b: Use of the columns.
            part: ``hessian``, ``ggn`` or ``residual``.

        Returns:
            ``[numel of a, numel of b]``.

        Raises:
            UnknownNameError: No such use; near names are offered.
            StoreError: The store has only sums over uses (``shared="sum"``), or not that part, or tiles are missing.
        """
        return UseReader(self.store).block(a, b, part)

    @property
    def activations(self) -> tuple[ActivationSpec, ...]:
        """Nodes whose activation blocks are stored, in topological order."""
        return self.layout.activations

    def activation_block(self, v: str, w: str, part: Part = "hessian", per_sample: bool = False) -> np.ndarray:
        """``H^f_vw = sum_n d2 L / d eps_v^n d eps_w^n`` with ``f = g(...) + eps`` at both nodes, n over samples.

        This is the perturbation semantics: symmetric, and independent of the order of nodes. For a mean loss the sum is the
        mean of the per-sample blocks of the per-sample losses. Samples that are coupled count as one, stacked.

        Args:
            v: Node of the rows, or a module whose output it is.
            w: Node of the columns, likewise.
            part: ``hessian``, ``ggn`` or ``residual``.
            per_sample: The terms of the sum, where they were kept (``activations_per_sample=True``).

        Returns:
            ``[d_v, d_w]``, or ``[n, d_v, d_w]``; a sample's value flattened row-major.

        Raises:
            UnknownNameError: No such activation; near names are offered.
            StoreError: None are stored, or not per sample, or tiles are missing.
        """
        reader = ActivationReader(self.store, part)
        return reader.block(reader.resolve(v), reader.resolve(w), per_sample)

    def dask(self, part: Part = "hessian") -> da.Array:
        """The whole matrix, ``[P, P]``, as a Dask array."""
        return lazy_matrix(PanelReader(self.store, part))

    def dense(self, part: Part = "hessian") -> np.ndarray:
        """The whole matrix, ``[P, P]``, in memory.

        Raises:
            StoreError: It would take more memory than is free; the message has the size.
        """
        needed = self.numel**2 * np.dtype(self.layout.dtype).itemsize
        free = psutil.virtual_memory().available
        if needed > 0.8 * free:
            raise StoreError(
                f"the whole matrix takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB of memory are free. Use block(a, b), "
                "dask() or operator()."
            )
        reader = PanelReader(self.store, part)
        whole = np.diag(reader.unreached_diagonal().astype(self.layout.dtype))
        positions = reader.positions()
        for band in reader.bands():
            columns = positions[band.panel.source][band.rows.start :]
            # The source is its panel's first target, so that its own columns are a range: rows of a view, not a copy.
            rows = slice(int(columns[0]), int(columns[0]) + band.rows.size)
            values = reader.band(band)
            whole[rows, columns] = values
            whole[columns, rows] = values.T
        return whole

    def operator(self, part: Part = "hessian") -> LinearOperator:
        """Products with the matrix as a SciPy ``LinearOperator``; blocks of vectors cost little more than one."""
        return to_scipy(self.symmetric_operator(part))

    def symmetric_operator(self, part: Part = "hessian", multiply: DType = "float64") -> AbstractSymmetricOperator:
        """The same as disthess's own operator.

        Args:
            part: Which.
            multiply: Dtype of products. ``float32`` is for a float32 store where an error of about ``5e-7 |H|_F |x| / sqrt(P)``
                does no harm, and takes a third of the time; a float64 store is always multiplied in float64.
        """
        return StoreOperator(PanelReader(self.store, part), multiply=multiply)

    def blocks(self, part: Part = "hessian", client: Any = None) -> BlockTable:
        """Frobenius norm of every block and trace of every diagonal one.

        Args:
            part: ``hessian``, ``ggn`` or ``residual``.
            client: A ``dask.distributed`` Client whose workers read the store; None for threads. Same numbers.
        """
        return block_table(PanelReader(self.store, part), client)

    def certificate(self, part: Part | Literal["activations"] = "hessian") -> Certificate | None:
        """The certificate of a part or of the activation blocks, or None if the run ended before it."""
        name = f"certificate/{part}"
        if not self.store.has_result(name):
            return None
        return certificate_of(self.store.read_result(name)[1], name, self.path)


def check_store(store: Any) -> None:
    """Refuse what is no store.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(store, HessianStore):
        raise ConfigError(f"expected a store, got {type(store).__name__}. Open one as disthess.open_store(path).")
