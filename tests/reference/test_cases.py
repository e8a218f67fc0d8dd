"""Every case through the public door, store included, against the dense oracle in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, Case, cases

import disthess
from disthess.prepare import Options, prepare

TOLERANCE = 1e-10


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the oracle (absolute where the oracle is zero)."""
    scale = np.linalg.norm(wanted)
    return float(np.linalg.norm(found - wanted) / (scale if scale > 1e-14 else 1.0))


def parts_of(case: Case) -> tuple[str, ...]:
    return ("hessian", "ggn", "residual") if case.ggn else ("hessian",)


@pytest.mark.parametrize("case", cases())
def test_store_equals_the_oracle_in_every_part(case: Case, tmp_path: Path) -> None:
    problem = case.make()
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=parts_of(case), progress=False)
    for part in parts_of(case):
        wanted = disthess.reference_hessian(problem, part)
        assert relative_error(store.dense(part), wanted) <= TOLERANCE, part
        np.testing.assert_array_equal(store.dense(part), store.dense(part).T)


WAYS = [{"basis": "output"}, {"basis": "parameter"}, {"shared": "sum"}, {"shared": "uses"}, {"method": "autograd"}]
TYPICAL = ("mlp_skip_gate", "rnn", "tied_language_model", "batch_norm_train")
"""Run in every test run; the other cases' ways are marked slow."""


def ways() -> list[object]:
    return [
        pytest.param(case, way, marks=() if case.name in TYPICAL else pytest.mark.slow, id=f"{case.name}-{way}")
        for case in CASES
        for way in WAYS
        if case.graph
    ]


@pytest.mark.parametrize(("case", "options"), ways())
def test_every_way_to_the_numbers_gives_the_same_numbers(case: Case, options: dict[str, str], tmp_path: Path) -> None:
    problem = case.make()
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False, certify=False, **options)
    assert relative_error(store.dense(), disthess.reference_hessian(problem)) <= TOLERANCE


@pytest.mark.parametrize("case", cases())
def test_reference_equals_torch_func(case: Case) -> None:
    problem = case.make()
    names = [parameter.name for parameter in problem.parameters()]
    tensors = [parameter.tensor.detach() for parameter in problem.parameters()]
    sizes = [tensor.numel() for tensor in tensors]

    def objective(flat: torch.Tensor) -> torch.Tensor:
        pieces = [piece.reshape(t.shape) for piece, t in zip(flat.split(sizes), tensors, strict=True)]
        values = dict(zip(names, pieces, strict=True))
        return sum(w * problem.value(b, values) for w, b in zip(problem.weights, problem.batches, strict=True))

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    wanted = torch.autograd.functional.hessian(objective, flat).numpy()
    assert relative_error(disthess.reference_hessian(problem), wanted) <= 1e-12


@pytest.mark.parametrize("case", cases((*TYPICAL, "contrastive", "branch_on_value", "multi_head", "one_sample")))
def test_independence_is_decided_as_known(case: Case) -> None:
    prepared = prepare(case.make(), Options())
    assert bool(prepared.programs) == case.graph
    if prepared.programs:
        assert prepared.programs[0].graph.independent == case.independent, prepared.plan.independence


@pytest.mark.parametrize("case", cases(TYPICAL))
def test_float32_agrees_to_its_own_precision(case: Case, tmp_path: Path) -> None:
    problem = case.make()
    store = disthess.compute(problem, tmp_path / "run.zarr", dtype="float32", progress=False)
    assert store.dense().dtype == np.float32
    assert relative_error(store.dense(), disthess.reference_hessian(problem)) <= 2e-5


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    problem = next(case for case in CASES if case.name == "batch_norm_train").make()
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert problem.model.training
    for name, tensor in problem.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.grad is None
