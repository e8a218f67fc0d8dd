"""Method E: edge pushing (Gower and Mello 2012), with the parameter tensors as sources. Exact for any DAG, no total Jacobians.

W holds symmetric blocks over the nodes not yet eliminated and all parameters; at first ``W[out, out] = nabla^2 L``, all else 0.
For k = n, ..., 1, with all ``W[., k]`` taken before anything is changed, for b in A_k:

    W[a, b] += W[a, k] D_{k<-b}                              a != k; mirrored
    W[a, b] += D_{k<-a}^T W[k, k] D_{k<-b} + S_k[a, b]       a in A_k

then k is deleted. What is left is H^theta. ``E[v, w]`` is ``W[v, w]`` when w is about to be eliminated: the block of the Hessian of
``L(f_1, ..., f_w)`` with later nodes substituted and earlier ones independent. Written out, for v <= w (corrected (1)):

    E[v,w] = [v=w=out] nabla^2 L + sum_{u in Ch(v) and Ch(w)} ( D_{u<-v}^T E[u,u] D_{u<-w} + S_u[v,w] )
             + sum_{u in Ch(w)} E[v,u] D_{u<-w} + sum_{u in Ch(v), u > w} D_{u<-v}^T E[w,u]^T

The last two sums are missing in print. Off the diagonal E depends on the order of elimination; H^theta does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from disthess.formalism.dag import Blocks, add_block, dense, theta
from disthess.formalism.local import Local


@dataclass(frozen=True, slots=True)
class Elimination:
    """What edge pushing gives.

    Attributes:
        hessian: ``H^theta``, ``[P, P]``.
        activations: ``E[v, w]`` for v no later than w; absent where zero.
    """

    hessian: Tensor
    activations: Blocks


def eliminate(local: Local) -> Elimination:
    """Eliminate the nodes of a network from the last to the first, in its own order."""
    out = local.dag.out.name
    work: Blocks = {(out, out): local.outer}
    alive = [*local.nodes, *(theta(name) for name in local.dag.parameters)]
    found: Blocks = {}
    for k in reversed(local.nodes):
        found.update({(v, k): work[v, k] for v in local.nodes if (v, k) in work and v in alive})
        column = {a: work[a, k] for a in alive if (a, k) in work}
        alive.remove(k)
        work = {pair: block for pair, block in work.items() if k not in pair}
        arguments = local.nodes[k].arguments
        for b in arguments:
            for a, block in column.items():
                if a != k:
                    pushed = block @ local.jacobians[k, b]
                    add_block(work, a, b, pushed)
                    add_block(work, b, a, pushed.T)
        for a in arguments:
            for b in arguments:
                add_block(work, a, b, local.curvatures[k][a, b])
                if k in column:
                    add_block(work, a, b, local.jacobians[k, a].T @ column[k] @ local.jacobians[k, b])
    sizes = {theta(name): size for name, size in local.dag.sizes.items()}
    return Elimination(dense(work, sizes), found)
