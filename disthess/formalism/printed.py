"""The paper's formulas (1), (2) and Algorithm 1 as printed. THEY ARE WRONG; kept to show by how much, and used for nothing.

(1) holds on chains of nodes (there only on the diagonal, if blocks are meant as perturbations) and nowhere else in full: it omits
what carries a pair of nodes down one side at a time. (2) multiplies a Jacobian from a child to its parent, which is zero, so that
between stacked layers no block is left. PAPER.md has the departures one by one.
"""

from __future__ import annotations

from torch import Tensor

from disthess.formalism.dag import Blocks, add_block, dense
from disthess.formalism.dag import theta as key
from disthess.formalism.local import Local, users


def printed_activation_blocks(local: Local, count_pure_twice: bool = False) -> Blocks:
    """Formula (1) read literally, with ``H[out, v] = 0`` for v other than out.

    Args:
        local: The point.
        count_pure_twice: As Algorithm 1 does, whose lines 8 and 13 both add ``T_{u;v}`` where v = w.
    """
    out = local.dag.out.name
    found: Blocks = {(out, out): local.outer}
    names = list(reversed(local.nodes))
    for v in names:
        for w in names:
            if out in (v, w):
                continue
            for u in local.children[v]:
                if u not in local.children[w]:
                    continue
                if (u, u) in found:
                    add_block(found, v, w, local.jacobians[u, v].T @ found[u, u] @ local.jacobians[u, w])
                add_block(found, v, w, local.curvatures[u][v, w])
                if count_pure_twice and v == w:
                    add_block(found, v, w, local.curvatures[u][v, w])
    return found


def printed_parameter_hessian(local: Local, activations: Blocks) -> Tensor:
    """Formula (2) read literally: its third and fourth lines multiply ``D_{w<-u}`` with u a child of w, which is zero."""
    found: Blocks = {}
    for p in local.dag.parameters:
        for q in local.dag.parameters:
            for v in users(local, p):
                for w in users(local, q):
                    for term in _first_lines(local, activations, (v, p), (w, q)):
                        add_block(found, p, q, term)
    return dense(found, local.dag.sizes)


def charitable_parameter_hessian(local: Local, activations: Blocks) -> Tensor:
    """Formula (2) read kindly: the Jacobian turned round, the index k left free, and D_w supplied.

    Then it has the paths ``w -> u -> v`` of length two, but neither the adjacent case nor any longer path.
    """
    found: Blocks = {}
    for p in local.dag.parameters:
        for q in local.dag.parameters:
            for v in users(local, p):
                for w in users(local, q):
                    for term in _first_lines(local, activations, (v, p), (w, q)):
                        add_block(found, p, q, term)
                    third = _third_line(local, (v, p), (w, q))
                    fourth = _third_line(local, (w, q), (v, p))
                    if third is not None:
                        add_block(found, p, q, third)
                    if fourth is not None:
                        add_block(found, p, q, fourth.T)
    return dense(found, local.dag.sizes)


def _first_lines(local: Local, activations: Blocks, row: tuple[str, str], column: tuple[str, str]) -> list[Tensor]:
    (v, p), (w, q) = row, column
    terms = []
    if (v, w) in activations:
        terms.append(local.jacobians[v, key(p)].T @ activations[v, w] @ local.jacobians[w, key(q)])
    if v == w:
        terms.append(local.curvatures[v][key(p), key(q)])
    return terms


def _third_line(local: Local, row: tuple[str, str], column: tuple[str, str]) -> Tensor | None:
    (v, p), (w, q) = row, column
    total = None
    for u in local.nodes[v].parents:
        if u in local.children[w]:
            term = local.curvatures[v][key(p), u] @ local.jacobians[u, w] @ local.jacobians[w, key(q)]
            total = term if total is None else total + term
    return total
