"""Activation blocks through the public door against autograd on perturbed activations, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, Case, cases
from torch import Tensor, nn

import disthess
from disthess.errors import ConfigError, StoreError, UnknownNameError
from disthess.graph.program import build_programs
from disthess.graph.run import evaluate, leaves
from disthess.problem import Problem, batch_tensors, twice_differentiable

TYPICAL = ("mlp_two_batches_sum", "tied_autoencoder", "batch_norm_train", "two_heads")


class Dense(nn.Module):
    """Two layers whose activations are perturbed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor, eps: dict[str, Tensor] | None = None) -> Tensor:
        eps = eps or {}
        z = self.fc1(x) + eps.get("fc1", 0)
        h = self.act(z) + eps.get("act", 0)
        return self.fc2(h * h) + eps.get("fc2", 0)


def dense_problem(samples: int = 5, reduction: str = "mean") -> Problem:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 3, dtype=torch.float64), torch.randn(samples, 2, dtype=torch.float64)
    return Problem(Dense().double(), loss="mse", batches=[(x, y)], reduction=reduction)


def by_hand(problem: Problem, v: str, w: str) -> np.ndarray:
    """``[n, d_v, d_w]``: the model called with perturbations of its own, no captured graph anywhere."""
    (x, y), sizes = problem.batches[0], {"fc1": 4, "act": 4, "fc2": 2}
    names, n = [v] if v == w else [v, w], len(x)
    ends = np.cumsum([0, *(n * sizes[name] for name in names)]).tolist()

    def loss(flat: Tensor) -> Tensor:
        eps = {name: flat[ends[i] : ends[i + 1]].reshape(n, -1) for i, name in enumerate(names)}
        return nn.functional.mse_loss(problem.model(x, eps), y, reduction=problem.reduction)

    whole = torch.autograd.functional.hessian(loss, torch.zeros(ends[-1], dtype=torch.float64)).numpy()
    rows, columns = slice(0, ends[1]), slice(ends[-2], ends[-1])
    block = whole[rows, columns].reshape(n, sizes[v], n, sizes[w])
    across = block.copy()
    across[np.arange(n), :, np.arange(n)] = 0
    assert np.abs(across).max() < 1e-15
    return np.stack([block[i, :, i] for i in range(n)])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_blocks_equal_a_model_perturbed_by_hand(per_sample: bool, reduction: str, tmp_path: Path) -> None:
    problem = dense_problem(reduction=reduction)
    store = disthess.compute(
        problem,
        tmp_path / "run.zarr",
        activations=["fc1", "act", "fc2"],
        activations_per_sample=per_sample,
        progress=False,
    )
    for v in ("fc1", "act", "fc2"):
        for w in ("fc1", "act", "fc2"):
            wanted = by_hand(problem, v, w)
            np.testing.assert_allclose(store.activation_block(v, w), wanted.sum(0), atol=1e-13)
            if per_sample:
                np.testing.assert_allclose(store.activation_block(v, w, per_sample=True), wanted, atol=1e-13)
    if not per_sample:
        with pytest.raises(StoreError, match="activations_per_sample=True"):
            store.activation_block("fc1", "fc2", per_sample=True)


def perturbed(problem: Problem, nodes: list[str], part: str) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Dense ``d2 L / d eps^2`` of the captured operations with ``eps`` shared by samples, by torch's own derivatives.

    The ggn part is ``J^T (d2 loss / dz2) J``, where z are the values that leave the model.
    """
    programs = build_programs(problem, frozenset(p.name for p in problem.parameters()), nodes)
    parameters = {p.name: p.tensor.detach() for p in problem.parameters()}
    asked = [node for node in programs[0].graph.nodes if node.asked]
    per = programs[0].graph.samples if programs[0].graph.independent else 1
    sizes = [(node.name, int(np.prod(node.shape)) // per) for node in asked]
    total = 0
    for index, program in enumerate(programs):
        total = total + problem.weights[index] * _second(program, parameters, problem.batches[index], sizes, part)
    return total.numpy(), sizes


def _second(program, parameters, batch, sizes, part):  # type: ignore[no-untyped-def]
    graph, inputs = program.graph, batch_tensors(batch)
    leaving = [
        node.index
        for node in graph.nodes
        if node.kind == "op" and node.live and node.in_model
        and any(node.index in other.refs() and not other.in_model for other in graph.nodes)
    ]  # fmt: skip
    ends = np.cumsum([0, *(size for _, size in sizes)]).tolist()

    def run(flat: Tensor, given: list[Tensor] | None = None) -> list[object]:
        values = leaves(graph, parameters, inputs, program.constants)
        place = 0
        for node in graph.nodes:
            if node.kind in ("op", "size"):
                values[node.index] = evaluate(node, values)
            if node.asked:
                values[node.index] = values[node.index] + _shared(
                    node, values[node.index], flat[ends[place] : ends[place + 1]]
                )
                place += 1
            if given is not None and node.index in leaving:
                values[node.index] = given[leaving.index(node.index)]
        return values

    zero = torch.zeros(ends[-1], dtype=torch.float64)
    with twice_differentiable():
        if part == "hessian":
            return torch.autograd.functional.hessian(lambda flat: run(flat)[graph.loss], zero)
        points = [run(zero)[index] for index in leaving]
        shapes = [tuple(point.shape) for point in points]  # type: ignore[attr-defined]
        flat_z = torch.cat([point.reshape(-1) for point in points])  # type: ignore[attr-defined]

        def outer(z: Tensor) -> Tensor:
            pieces = z.split([int(np.prod(shape)) for shape in shapes])
            return run(zero, [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)])[graph.loss]

        def inner(flat: Tensor) -> Tensor:
            values = run(flat)
            return torch.cat([values[index].reshape(-1) for index in leaving])  # type: ignore[attr-defined]

        curvature = torch.autograd.functional.hessian(outer, flat_z)
        slope = torch.autograd.functional.jacobian(inner, zero)
        return slope.T @ curvature @ slope


def _shared(node, value, entries):  # type: ignore[no-untyped-def]
    """The same entries at every sample, by moving the batch axis to the front (cases with one row per sample, or coupled)."""
    if node.batch is None:
        return entries.reshape(value.shape)
    axis = node.batch
    n = value.numel() // entries.numel()
    apart = value.unflatten(axis.dim, (axis.outer, n, axis.inner)).movedim(axis.dim + 1, 0)
    others = [size for dim, size in enumerate(value.shape) if dim != axis.dim]
    spread = entries.reshape(axis.outer, axis.inner, *others).movedim((0, 1), (axis.dim, axis.dim + 1))
    return spread.expand(apart.shape).movedim(0, axis.dim + 1).flatten(axis.dim, axis.dim + 2)


def in_model_nodes(case: Case, limit: int) -> list[str]:
    problem = case.make()
    graph = build_programs(problem, frozenset(p.name for p in problem.parameters()))[0].graph
    kind = "sample" if graph.independent else "weight"
    names = [
        n.name
        for n in graph.nodes
        if n.kind == "op" and n.live and n.region == kind and n.index != graph.loss and (n.in_model or not case.ggn)
    ]
    if not graph.independent:
        names = [name for name in names if not name.endswith(".t")]
    return [*names[: limit - 1], names[-1]]


@pytest.mark.parametrize("case", cases(TYPICAL, graph=True))
def test_every_case_in_both_parts(case: Case, tmp_path: Path) -> None:
    problem, nodes = case.make(), in_model_nodes(case, 6)
    parts = ("hessian", "ggn", "residual") if case.ggn else ("hessian",)
    store = disthess.compute(problem, tmp_path / "run.zarr", activations=nodes, parts=parts, progress=False)
    for part in parts[:2]:
        wanted, sizes = perturbed(problem, nodes, part)
        found = np.block([[store.activation_block(v, w, part=part) for w, _ in sizes] for v, _ in sizes])
        assert np.linalg.norm(found - wanted) <= 1e-10 * max(np.linalg.norm(wanted), 1e-3), part
    if case.ggn:
        v, w = sizes[0][0], sizes[-1][0]
        sums = store.activation_block(v, w, part="ggn") + store.activation_block(v, w, part="residual")
        np.testing.assert_allclose(store.activation_block(v, w), sums, atol=1e-12)
    certificate = store.certificate("activations")
    assert certificate is not None
    assert certificate.passed
    assert certificate.worst <= 1e-10


def test_own_blocks_are_symmetric_without_being_mirrored(tmp_path: Path) -> None:
    store = disthess.compute(dense_problem(), tmp_path / "run.zarr", activations="*", progress=False)
    for entry in store.activations:
        values = store.activation_block(entry.name, entry.name)
        assert np.abs(values - values.T).max() <= 1e-15
    # An upper panel alone holds the pair once: reading it the other way round is a transpose.
    np.testing.assert_array_equal(store.activation_block("fc1", "act"), store.activation_block("act", "fc1").T)


def test_coupled_samples_are_stacked(tmp_path: Path) -> None:
    problem = next(case for case in CASES if case.name == "batch_norm_train").make()
    store = disthess.compute(problem, tmp_path / "run.zarr", activations=["fc1", "norm"], progress=False)
    assert store.activations[0].shape == (6, 4)
    block = store.activation_block("fc1", "fc1").reshape(6, 4, 6, 4)
    assert np.abs(block[0, :, 1]).max() > 1e-6


def test_activations_before_the_parameters_asked_for(tmp_path: Path) -> None:
    problem = dense_problem()
    store = disthess.compute(
        problem, tmp_path / "run.zarr", activations=["fc1", "input_0"], parameters="fc2.*", progress=False
    )
    np.testing.assert_allclose(store.activation_block("fc1", "fc1"), by_hand(problem, "fc1", "fc1").sum(0), atol=1e-13)
    assert store.activation_block("input_0", "fc1").shape == (3, 4)
    wanted = disthess.reference_hessian(problem, parameters="fc2.*")
    np.testing.assert_allclose(store.dense(), wanted, atol=1e-13)


def test_float32_and_two_batches(tmp_path: Path) -> None:
    problem = dense_problem(6)
    x, y = problem.batches[0]
    split = Problem(problem.model, loss="mse", batches=[(x[:2], y[:2]), (x[2:], y[2:])])
    store = disthess.compute(
        split, tmp_path / "run.zarr", activations=["fc1"], activations_per_sample=True, dtype="float32", progress=False
    )
    found = store.activation_block("fc1", "fc1", per_sample=True)
    assert found.dtype == np.float32
    assert found.shape == (6, 4, 4)
    np.testing.assert_allclose(found, by_hand(problem, "fc1", "fc1"), atol=1e-6)


class Normalised(nn.Module):
    """A normalised weight, and a node without inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(x)) @ torch.eye(3, dtype=x.dtype))


def test_globs_pass_over_what_is_no_activation(tmp_path: Path) -> None:
    x, y = dense_problem().batches[0]
    problem = Problem(Normalised().double(), loss="mse", batches=[(x[:4], y[:4]), (x[4:], y[4:])])
    store = disthess.compute(problem, tmp_path / "run.zarr", activations="*", progress=False)
    assert [entry.name for entry in store.activations] == ["layer", "out"]
    store = disthess.compute(problem, tmp_path / "nodes.zarr", activations=["tanh", "matmul*"], progress=False)
    assert {entry.name for entry in store.activations} >= {"tanh"}


@pytest.mark.slow
def test_serial_and_ray_write_the_same_activation_bytes(tmp_path: Path) -> None:
    problem, asked = (
        dense_problem(),
        {"activations": "*", "activations_per_sample": True, "threads": 1, "progress": False},
    )
    one = disthess.compute(problem, tmp_path / "one.zarr", **asked)
    two = disthess.compute(problem, tmp_path / "two.zarr", executor="ray", workers=2, **asked)
    files = sorted(path.relative_to(one.path) for path in (Path(one.path) / "activations").rglob("c/*/*"))
    assert files
    for file in files:
        assert (Path(one.path) / file).read_bytes() == (Path(two.path) / file).read_bytes(), file


def test_what_is_no_activation_is_refused_with_near_names(tmp_path: Path) -> None:
    problem = dense_problem()
    with pytest.raises(ConfigError, match=r"near names: .*fc1"):
        disthess.compute(problem, tmp_path / "run.zarr", activations=["fc11"], progress=False)
    penalised = next(case for case in CASES if case.name == "weight_decay").make()
    with pytest.raises(ConfigError, match=r"from parameters alone|over several samples"):
        disthess.compute(penalised, tmp_path / "run.zarr", activations=["loss.*"], progress=False)
    with pytest.raises(ConfigError, match="method='auto'"):
        disthess.compute(problem, tmp_path / "run.zarr", activations=["fc1"], method="autograd", progress=False)
    branching = next(case for case in CASES if case.name == "branch_on_value").make()
    with pytest.raises(ConfigError, match="cannot be captured"):
        disthess.compute(branching, tmp_path / "run.zarr", activations=["fc1"], progress=False)
    assert not (tmp_path / "run.zarr").exists()
    store = disthess.compute(problem, tmp_path / "run.zarr", activations=["fc1"], progress=False)
    with pytest.raises(UnknownNameError, match="fc1"):
        store.activation_block("fc1", "fc2")
    with pytest.raises(StoreError, match="another problem"):
        disthess.compute(problem, tmp_path / "run.zarr", activations=["fc2"], progress=False)
    plain = disthess.compute(problem, tmp_path / "plain.zarr", progress=False)
    with pytest.raises(StoreError, match="holds no activation"):
        plain.activation_block("fc1", "fc1")
