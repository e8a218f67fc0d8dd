"""The probe basis: tangents start from any given vectors, and one sweep yields their products with the whole Hessian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from disthess.graph.waves import leading_to
from disthess.sweep.buffers import Buffers
from disthess.sweep.frame import Frame
from disthess.sweep.panel import ParameterSink, Targets
from disthess.sweep.primal import Primal
from disthess.sweep.wave import forward, reverse
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
                reverse(frame, tangents, part, passed, ParameterSink(targets, held, 0))
    return torch.cat([held.block(name, size) for name, size in sizes.items()], dim=1)
