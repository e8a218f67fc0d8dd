"""The dense oracle: the same objects by autograd on the whole network, by their definitions and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import functional

from disthess.formalism.dag import Blocks, Dag


def autograd_hessian(dag: Dag) -> Tensor:
    """``d2 L / d theta^2``, ``[P, P]``, in the order of ``dag.parameters``."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in dag.parameters.values()])
    return functional.hessian(lambda given: dag.objective(dag.run(_named(dag, given))), flat)


def autograd_perturbations(dag: Dag) -> tuple[Blocks, Blocks]:
    """``P[v, w] = d2 L / d eps_v d eps_w`` of all nodes, and the mixed ``d2 L / d theta_p d eps_w``."""
    values = dag.run(dag.parameters)
    nodes = {name: value.numel() for name, value in values.items()}
    sizes = {**dag.sizes, **{f"eps {name}": size for name, size in nodes.items()}}
    start = torch.cat([tensor.detach().reshape(-1) for tensor in dag.parameters.values()])
    flat = torch.cat([start, torch.zeros(sum(nodes.values()), dtype=torch.float64)])

    def objective(given: Tensor) -> Tensor:
        pieces = dict(zip(sizes, given.split(list(sizes.values())), strict=True))
        shifts = {name: pieces[f"eps {name}"] for name in nodes}
        return dag.objective(dag.run(_shaped(dag, pieces), shifts))

    whole = functional.hessian(objective, flat)
    rows = dict(zip(sizes, whole.split(list(sizes.values())), strict=True))
    blocks = {a: dict(zip(sizes, rows[a].split(list(sizes.values()), dim=1), strict=True)) for a in sizes}
    activations = {(v, w): blocks[f"eps {v}"][f"eps {w}"] for v in nodes for w in nodes}
    mixed = {(p, w): blocks[p][f"eps {w}"] for p in dag.parameters for w in nodes}
    return activations, mixed


def autograd_elimination(dag: Dag) -> Blocks:
    """``E[v, w]``, v no later than w: the Hessian of ``L(f_1, ..., f_w)``, later nodes substituted, these independent."""
    values = {name: value.detach() for name, value in dag.run(dag.parameters).items()}
    names = [node.name for node in dag.nodes]
    found: Blocks = {}
    for place, w in enumerate(names):
        given = names[: place + 1]
        sizes = [values[name].numel() for name in given]

        def objective(flat: Tensor, given: list[str] = given, sizes: list[int] = sizes) -> Tensor:
            held = {
                name: piece.reshape(values[name].shape) for name, piece in zip(given, flat.split(sizes), strict=True)
            }
            for node in dag.nodes[len(given) :]:
                held[node.name] = node.function(
                    *(held[name] for name in node.parents), *(dag.parameters[name].detach() for name in node.parameters)
                )
            return dag.objective(held)

        whole = functional.hessian(objective, torch.cat([values[name].reshape(-1) for name in given]))
        for v, row in zip(given, whole.split(sizes), strict=True):
            found[v, w] = row[:, -sizes[-1] :]
    return found


def _named(dag: Dag, flat: Tensor) -> dict[str, Tensor]:
    pieces = flat.split(list(dag.sizes.values()))
    return _shaped(dag, dict(zip(dag.parameters, pieces, strict=True)))


def _shaped(dag: Dag, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: pieces[name].reshape(tensor.shape) for name, tensor in dag.parameters.items()}
