"""The corrected recursions on small networks against autograd by definition, and what the printed ones leave out."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from disthess.errors import ConfigError
from disthess.formalism.dag import Dag, DagNode
from disthess.formalism.eliminate import eliminate
from disthess.formalism.local import differentiate
from disthess.formalism.oracle import autograd_elimination, autograd_hessian, autograd_perturbations
from disthess.formalism.paths import split_paths
from disthess.formalism.perturb import activation_hessian, mixed_hessian, parameter_hessian
from disthess.formalism.printed import (
    charitable_parameter_hessian,
    printed_activation_blocks,
    printed_parameter_hessian,
)

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

from paper_architectures import ARCHITECTURES
from paper_check import check

PARAMETERS = [3, 12, 39, 39, 26, 31, 31, 32, 32, 16, 24, 22, 32, 13, 49, 32, 11, 9]
EXACT_AS_PRINTED = {"single node", "star (parameters only at a join)"}
DIAGONAL_WRONG = {
    "residual (additive) skip", "gated (multiplicative) skip", "attention q, k, v", "RNN T=4, shared W",
    "convolution x 2, shared kernels", "VAE -ELBO, reparametrised", "tied autoencoder W, W^T",
}  # fmt: skip
KIND_READING_EXACT = {"one hidden layer, split", "softmax-CE fused", "softmax node + log-CE"} | EXACT_AS_PRINTED


@pytest.mark.parametrize(("name", "numel"), list(zip(ARCHITECTURES, PARAMETERS, strict=True)), ids=list(ARCHITECTURES))
def test_the_table(name: str, numel: int) -> None:
    row = check(ARCHITECTURES[name]())
    assert row.numel == numel
    for column in ("E", "P", "path", "Hf", "mixed"):
        assert row.errors[column] <= 1e-12, column
    assert (row.errors["lit"] <= 1e-12) == (name in EXACT_AS_PRINTED)
    assert (row.errors["lit diag"] > 1e-6) == (name in DIAGONAL_WRONG)
    assert (row.errors["P+char"] <= 1e-12) == (name in KIND_READING_EXACT)
    if name != "single node":
        assert row.printed_activations[2] > 0.1
        assert row.errors["Alg1"] > 0.1


def blocks_are_zero_between_parameters(matrix: torch.Tensor, dag: Dag, groups: list[list[str]]) -> bool:
    names = list(dag.sizes)
    owner = torch.cat([torch.full((dag.sizes[name],), [name in g for g in groups].index(True)) for name in names])
    return bool((matrix[owner[:, None] != owner[None, :]] == 0).all())


def test_printed_2_is_block_diagonal_on_a_chain() -> None:
    dag = ARCHITECTURES["chain MLP tanh, node = layer"]()
    local = differentiate(dag)
    layers = [[f"l{i}.W", f"l{i}.b"] for i in (1, 2, 3)]
    literal = printed_parameter_hessian(local, printed_activation_blocks(local))
    assert blocks_are_zero_between_parameters(literal, dag, layers)
    assert not blocks_are_zero_between_parameters(autograd_hessian(dag), dag, layers)


@pytest.mark.parametrize("name", ["two towers + bilinear join", "attention q, k, v", "VAE -ELBO, reparametrised"])
def test_the_hessian_does_not_depend_on_the_order_of_nodes(name: str) -> None:
    dag = ARCHITECTURES[name]()
    truth = autograd_hessian(dag)
    draw = random.Random(0)
    for _ in range(5):
        other = dag.reordered(random_order(dag, draw))
        local = differentiate(other)
        assert (eliminate(local).hessian - truth).norm() <= 1e-12 * truth.norm()
        wanted = autograd_elimination(other)
        found = eliminate(local).activations
        assert all((found.get(pair, 0) - block).norm() <= 1e-12 for pair, block in wanted.items())


def random_order(dag: Dag, draw: random.Random) -> tuple[str, ...]:
    left, order = list(dag.nodes), []
    while left:
        ready = [node for node in left if all(parent in order for parent in node.parents)]
        ready = [node for node in ready if node.name != dag.out.name] or ready
        node = draw.choice(ready)
        order.append(node.name)
        left.remove(node)
    return tuple(order)


def test_eliminated_blocks_off_the_diagonal_depend_on_the_order_and_perturbed_ones_do_not() -> None:
    dag = ARCHITECTURES["two towers + bilinear join"]()
    one = differentiate(dag.reordered(("a1", "a2", "b1", "b2", "join")))
    two = differentiate(dag.reordered(("a1", "b1", "a2", "b2", "join")))
    # a1 before b1 in both: the block is there in one order and zero in the other.
    first, second = (eliminate(local).activations.get(("a1", "b1")) for local in (one, two))
    norms = sorted(0.0 if block is None else float(block.norm()) for block in (first, second))
    assert norms[0] == 0.0
    assert norms[1] > 1e-3
    left, right = activation_hessian(one), activation_hessian(two)
    assert all((block - right[pair]).norm() <= 1e-15 for pair, block in left.items())


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_symmetry_and_relations_without_mirroring(name: str) -> None:
    dag = ARCHITECTURES[name]()
    local = differentiate(dag)
    found, eliminated = activation_hessian(local), eliminate(local).activations
    for (v, w), block in found.items():
        assert (block - found.get((w, v), torch.zeros_like(block.T)).T).norm() <= 1e-13
        if v == w:
            assert (block - eliminated.get((v, v), 0)).norm() <= 1e-13
    names = list(local.nodes)
    for i, v in enumerate(names):
        for w in names[i:]:
            between = [
                local.totals[a, v].T @ eliminated[a, w]
                for a in names[i : names.index(w) + 1]
                if (a, v) in local.totals and (a, w) in eliminated
            ]
            total = sum(between, start=torch.zeros_like(found.get((v, w), torch.zeros(1))))
            assert (total - found.get((v, w), 0)).norm() <= 1e-13
    split = split_paths(local)
    truth = autograd_hessian(dag)
    assert (split.hessian - truth).norm() <= 1e-12 * truth.norm()


def test_d_h_d_is_indefinite_where_the_gauss_newton_matrix_is_not() -> None:
    local = differentiate(ARCHITECTURES["chain MLP tanh, node = layer"]())
    blocks = activation_hessian(local)
    jacobian = torch.cat([local.jacobians["l1", "theta:l1.W"], local.jacobians["l1", "theta:l1.b"]], dim=1)
    assert float(torch.linalg.eigvalsh(jacobian.T @ blocks["l1", "l1"] @ jacobian).min()) < -1e-3
    assert float(torch.linalg.eigvalsh(split_paths(local).ggn).min()) > -1e-14


def test_out_that_is_read_by_nobody_and_dead_nodes() -> None:
    w = torch.tensor([0.3, -0.2], dtype=torch.float64)
    nodes = (
        DagNode("a", (), ("w",), lambda w: w.sin()),
        DagNode("dead", ("a",), ("w",), lambda a, w: a * w),
        DagNode("b", ("a",), ("w",), lambda a, w: (a * w).sum().reshape(1)),
    )
    dag = Dag(nodes, {"w": w})
    local = differentiate(dag)
    assert "dead" not in local.nodes
    truth = autograd_hessian(dag)
    for found in (
        eliminate(local).hessian, parameter_hessian(local, activation_hessian(local)), split_paths(local).hessian
    ):  # fmt: skip
        assert (found - truth).norm() <= 1e-15
    _, mixed = autograd_perturbations(dag)
    found = mixed_hessian(local, activation_hessian(local))
    assert (found["w", "a"] - mixed["w", "a"]).norm() <= 1e-15
    assert (charitable_parameter_hessian(local, activation_hessian(local)) - truth).norm() > 1e-3


def test_networks_that_are_none_are_refused() -> None:
    w = {"w": torch.ones(1, dtype=torch.float64)}
    good = DagNode("a", (), ("w",), lambda w: w)
    for nodes in ((), (good, good), (DagNode("b", ("a",), (), torch.sin),), (DagNode("b", (), ("v",), torch.sin),)):
        with pytest.raises(ConfigError):
            Dag(nodes, w)
    with pytest.raises(ConfigError, match="twice"):
        Dag((good, DagNode("b", ("a", "a"), (), torch.add)), w)
    wide = Dag((DagNode("a", (), ("w",), lambda w: w.expand(3)),), w)
    with pytest.raises(ConfigError, match="scalar"):
        autograd_hessian(wide)
    with pytest.raises(ConfigError, match="order"):
        Dag((good,), w).reordered(("b",))
