"""Method P: perturbations. ``P[v, w] = d2 L / d eps_v d eps_w`` with ``f = g(...) + eps`` at every node; corrected (1) and (2).

    P[v,w] = [v=out] nabla^2 L J_{out<-w} + sum_{u in Ch(v)} ( D_{u<-v}^T P[u,w] + sum_{b in Pa(u)} S_u[v,b] J_{b<-w} )     (P1)

    d2 L / d theta_v d eps_w = D_v^T P[v,w] + sum_{a in Pa(v)} S_v[theta_v,a] J_{a<-w}                                     (P2)

    H[theta_v, theta_w] = D_v^T P[v,w] D_w + [v=w] S_v[theta_v,theta_v]
                          + sum_{a in Pa(v)} S_v[theta_v,a] J_{a<-w} D_w + D_v^T sum_{a in Pa(w)} J_{a<-v}^T S_w[a,theta_w]  (P3)

(P1) is taken for all v and w: nothing is mirrored, so that its symmetry is a check. P does not depend on the order of nodes, and
``P[v,v] = E[v,v]``. A parameter that several nodes read gets the sum over ordered pairs of them.
"""

from __future__ import annotations

from torch import Tensor

from disthess.formalism.dag import Blocks, add_block, dense
from disthess.formalism.dag import theta as key
from disthess.formalism.local import Local, users


def activation_hessian(local: Local) -> Blocks:
    """``P[v, w]`` of every pair of live nodes, ``[d_v, d_w]``, by (P1)."""
    out = local.dag.out.name
    found: Blocks = {}
    for v in reversed(local.nodes):
        for w in local.nodes:
            if v == out and (out, w) in local.totals:
                add_block(found, v, w, local.outer @ local.totals[out, w])
            for u in local.children[v]:
                if (u, w) in found:
                    add_block(found, v, w, local.jacobians[u, v].T @ found[u, w])
                for b in local.nodes[u].parents:
                    if (b, w) in local.totals:
                        add_block(found, v, w, local.curvatures[u][v, b] @ local.totals[b, w])
    return found


def mixed_hessian(local: Local, activations: Blocks) -> Blocks:
    """``d2 L / d theta_p d eps_w`` by parameter name and node, ``[p, d_w]``, by (P2) summed over the nodes that read p."""
    found: Blocks = {}
    for p in local.dag.parameters:
        for v in users(local, p):
            for w in local.nodes:
                if (v, w) in activations:
                    add_block(found, p, w, local.jacobians[v, key(p)].T @ activations[v, w])
                for a in local.nodes[v].parents:
                    if (a, w) in local.totals:
                        add_block(found, p, w, local.curvatures[v][key(p), a] @ local.totals[a, w])
    return found


def parameter_hessian(local: Local, activations: Blocks) -> Tensor:
    """``H^theta``, ``[P, P]``, by (P3); ``activations`` may be any blocks in the place of P."""
    found: Blocks = {}
    for p in local.dag.parameters:
        for q in local.dag.parameters:
            for v in users(local, p):
                for w in users(local, q):
                    for term in _terms(local, activations, (v, p), (w, q)):
                        add_block(found, p, q, term)
    return dense(found, local.dag.sizes)


def _terms(local: Local, activations: Blocks, row: tuple[str, str], column: tuple[str, str]) -> list[Tensor]:
    (v, p), (w, q) = row, column
    left, right = local.jacobians[v, key(p)], local.jacobians[w, key(q)]
    terms = []
    if (v, w) in activations:
        terms.append(left.T @ activations[v, w] @ right)
    if v == w:
        terms.append(local.curvatures[v][key(p), key(q)])
    for a in local.nodes[v].parents:
        if (a, w) in local.totals:
            terms.append(local.curvatures[v][key(p), a] @ local.totals[a, w] @ right)
    for a in local.nodes[w].parents:
        if (a, v) in local.totals:
            terms.append(left.T @ local.totals[a, v].T @ local.curvatures[w][a, key(q)])
    return terms
