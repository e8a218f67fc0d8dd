"""The probe basis: tangents start from any given vectors, and one sweep yields their products with the whole Hessian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from disthess.graph.waves import leading_to
from disthess.rules.base import Stack
from disthess.sweep.buffers import Block, Buffers
from disthess.sweep.frame import Frame
from disthess.sweep.panel import ParameterSink
from disthess.sweep.primal import Primal
from disthess.sweep.rows import Targets
from disthess.sweep.wave import AbstractSink, forward, reverse
from disthess.types import Part, Span


def probe_products(
    primals: Sequence[Primal],
    parameters: Mapping[str, Tensor],
    vectors: Tensor,
    *,
    part: Part = "hessian",
    samples: int = 256,
) -> Tensor:
    """``H v_k`` (or the product with another part) for K vectors at once, by the graph sweep.

    Args:
        primals: One per batch.
        parameters: Those whose Hessian it is, in the order of the vectors' entries.
        vectors: ``[K, P]``.
        part: Which part.
        samples: Samples per microbatch.

    Returns:
        ``[K, P]``, in the objective's own scale, summed over batches.
    """
    sizes = {name: tensor.numel() for name, tensor in parameters.items()}
    pieces = dict(zip(parameters, vectors.split(list(sizes.values()), dim=1), strict=True))
    held = Buffers(len(vectors), next(iter(parameters.values())).detach())
    with torch.no_grad():
        for primal in primals:
            leaves = [n for n in primal.graph.nodes if n.kind == "use" and n.live and n.op in sizes]
            seeds = {leaf.index: pieces[leaf.op].reshape(-1, *parameters[leaf.op].shape) for leaf in leaves}
            if not seeds:
                continue
            targets = Targets({leaf.index: leaf.op for leaf in leaves}, {leaf.index: sizes[leaf.op] for leaf in leaves})
            passed = leading_to(primal.graph, seeds)
            for start in range(0, primal.samples, samples):
                frame = Frame(primal, Span(start, min(start + samples, primal.samples)))
                tangents = forward(frame, seeds)
                reverse(frame, tangents, part, passed, ParameterSink(targets, held))
    return torch.cat([held.take(Block(name, size)) for name, size in sizes.items()], dim=1)


def whole_products(primal: Primal, parameters: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
    """As `probe_products` of one batch in one piece, with no value written to twice: a function that can be recorded.

    Args:
        primal: The batch.
        parameters: Those whose Hessian it is, in the order of the vectors' entries.
        vectors: ``[K, P]``.

    Returns:
        ``[K, P]``, in the objective's own scale.
    """
    count = len(vectors)
    pieces = dict(zip(parameters, vectors.split([it.numel() for it in parameters.values()], dim=1), strict=True))
    leaves = [node for node in primal.graph.nodes if node.kind == "use" and node.live and node.op in parameters]
    sums = _Sums()
    if leaves:
        # The recorded strides are those of every later call: views of the vectors' own rows.
        seeds = {leaf.index: pieces[leaf.op].reshape(count, *parameters[leaf.op].shape) for leaf in leaves}
        frame = Frame(primal, Span(0, primal.samples))
        reverse(frame, forward(frame, seeds), "hessian", leading_to(primal.graph, seeds), sums)
    found: dict[str, Tensor] = {}
    for leaf in leaves:
        rows = sums.rows.get(leaf.index)
        if rows is not None:
            flat = rows.reshape(count, -1)
            found[leaf.op] = found[leaf.op] + flat if leaf.op in found else flat
    zeros = {name: it.new_zeros(count, it.numel()) for name, it in parameters.items() if name not in found}
    return torch.cat([found[name] if name in found else zeros[name] for name in parameters], dim=1)


@final
class _Sums(AbstractSink):
    """Keeps what arrives at leaves."""

    per_sample = False

    def __init__(self) -> None:
        self.rows: dict[int, Stack] = {}

    @override
    def take(self, leaf: int, rows: Stack) -> None:
        self.rows[leaf] = rows
