"""Every number of an audit against the dense Hessian and Gauss-Newton matrix of autograd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.audit_config import AuditConfig, parse_audit
from disthess.audits.gauss_newton import AbstractForms, GaussNewtonForms, ggn_share, share_of
from disthess.audits.measure import Measured, measure
from disthess.audits.meter import Meter
from disthess.audits.metrics import METRICS
from disthess.audits.subject import make_subject
from disthess.errors import ConfigError, ProblemError
from disthess.linalg.moments import estimate_moments
from disthess.linalg.operator import DenseOperator
from disthess.linalg.stopping import judge


def network(width: int, activation: type[nn.Module] = nn.Tanh, **options: Any) -> disthess.Problem:
    torch.manual_seed(1)
    layers = [nn.Linear(5, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 3)]
    x, y = torch.randn(30, 5).double(), torch.randint(0, 3, (30,))
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    return disthess.Problem(nn.Sequential(*layers).double(), loss="cross_entropy", batches=batches, **options)


def config(**sections: Any) -> AuditConfig:
    return parse_audit({"problem": {"factory": "a:b"}, "history": "unused.zarr", **sections}, "here")


def audited(problem: disthess.Problem, **sections: Any) -> Measured:
    subject = make_subject(problem, config(**{**sections, "measure": {"threads": 1, **sections.get("measure", {})}}))
    meter = Meter(subject.parts())
    meter.begin_checkpoint()
    return measure(subject, subject.bound(), meter)


def gauss_newton(problem: disthess.Problem) -> np.ndarray:
    """By the definition: ``sum_b w_b J^T (d2 loss / dz2) J + decay``."""
    parameters = {entry.name: entry.tensor.detach() for entry in problem.parameters()}
    total = np.diag(
        np.concatenate([np.full(t.numel(), problem.weight_decay.get(name, 0.0)) for name, t in parameters.items()])
    )
    for (x, y), weight in zip(problem.batches, problem.weights, strict=True):

        def outputs(given: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return torch.func.functional_call(problem.model, given, (x,)).reshape(-1)

        def loss(flat: Tensor, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(flat.reshape(len(y), -1), y)

        parts = torch.func.jacrev(outputs)(parameters)
        jacobian = torch.cat([parts[name].flatten(1) for name in parameters], dim=1)
        total = total + weight * (jacobian.T @ torch.func.hessian(loss)(outputs(parameters)) @ jacobian).numpy()
    return total


def truth(problem: disthess.Problem, measured: Measured) -> dict[str, float]:
    hessian = np.asarray(disthess.reference_hessian(problem))
    values, vectors = np.linalg.eigh(hessian)
    square, norm = float((values**2).sum()), float(np.abs(values).max())
    parameters = [entry.tensor for entry in problem.parameters()]
    loss = sum(weight * problem.value(batch) for batch, weight in zip(problem.batches, problem.weights, strict=True))
    loss = loss + sum(
        0.5 * problem.weight_decay.get(p.name, 0.0) * p.tensor.square().sum() for p in problem.parameters()
    )
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).numpy()
    point = torch.cat([tensor.detach().reshape(-1) for tensor in parameters]).numpy()
    report = judge(values, vectors.T @ gradient, gradient, point, float(loss.detach()))
    return {
        "loss": float(loss.detach()),
        "gradient_norm": float(np.linalg.norm(gradient)),
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        "rate_limit": 2 / float(values[-1]),
        "trace": float(values.sum()),
        "frobenius": math.sqrt(square),
        "effective_rank": float(values.sum()) ** 2 / square,
        "stable_rank": square / norm**2,
        "negative_mass": float((values < -1e-9 * norm).mean()),
        "ggn_share": share_of(float(np.trace(gauss_newton(problem))), float(values.sum())),
        "kinks": 0.0,
        "scaled_gradient": report.scaled_gradient,
        "newton_decrement": report.newton_decrement,
        "stop": float(report.stop),
    }


def test_every_metric_of_a_small_model_is_exact() -> None:
    problem = network(8, weight_decay={"0.*": 0.05})
    found = audited(problem, measure={"krylov": 200})
    wanted = truth(problem, found)
    assert [entry.metric for entry in found.estimates] == list(METRICS)
    for entry in found.estimates:
        assert entry.exact, entry
        # The shifted Hessian is nearly singular there: its decrement is as certain as 1e-8 of the spectrum lets it be.
        rel = 1e-5 if entry.metric == "newton_decrement" else 1e-8
        assert entry.value == pytest.approx(wanted[entry.metric], rel=rel, abs=1e-10), entry.metric


LARGE = [metric for metric in METRICS if metric not in ("kinks", "newton_decrement", "stop")]
"""Those that are quick, and estimated or exact for any size."""


def test_every_metric_of_a_larger_model_lies_in_its_interval() -> None:
    problem = network(16)
    found = audited(
        problem, measure={"metrics": [*LARGE, "density"], "confidence": 0.999, "density_probes": 3, "density_steps": 20}
    )
    wanted = truth(problem, found)
    assert problem.numel > 300
    for entry in found.estimates:
        slip = 1e-8 * max(1.0, abs(wanted[entry.metric]))
        assert entry.low - slip <= wanted[entry.metric] <= entry.high + slip, entry
    estimated = {entry.metric for entry in found.estimates if not entry.exact}
    assert {"trace", "frobenius", "effective_rank", "stable_rank", "ggn_share", "lambda_max"} <= estimated
    grid, value = found.arrays["density/grid"], found.arrays["density/value"]
    assert len(grid) == len(value) == len(found.arrays["density/error"])
    assert np.trapezoid(value, grid) == pytest.approx(1.0, abs=1e-2)


def test_blocks_couplings_and_tiles_are_those_of_the_matrix() -> None:
    problem = network(8)
    hessian = np.asarray(disthess.reference_hessian(problem))
    blocks = {"first": "0.*", "rows": "2.weight[0:2]", "biases": ["*.bias"]}
    found = audited(
        problem,
        measure={"metrics": ["loss"]},
        blocks=blocks,
        couplings={"of": "parameters", "probes": 80, "sections": {"top": "0.weight[0:4]"}},
        tiles={"corner": ["2.weight[1:3]", "0.bias"], "own": ["4.bias", "4.bias"]},
    )
    starts = dict(
        zip(("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"), np.cumsum([0, 40, 8, 64, 8, 24]))
    )
    rows = np.arange(starts["2.weight"] + 8, starts["2.weight"] + 24)
    columns = np.arange(40, 48)
    np.testing.assert_allclose(found.arrays["tile/corner"], hessian[np.ix_(rows, columns)], rtol=1e-9, atol=1e-12)
    last = np.arange(starts["4.bias"], starts["4.bias"] + 3)
    np.testing.assert_allclose(found.arrays["tile/own"], hessian[np.ix_(last, last)], rtol=1e-9, atol=1e-12)
    assert found.blocks == ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias", "top")
    rest, top = np.arange(20, 40), np.arange(20)
    norm = found.arrays["norm/value"]
    assert norm[0, 6] == pytest.approx(np.linalg.norm(hessian[np.ix_(rest, top)]), rel=1e-9)
    assert found.arrays["coupling/low"].shape == (7, 7)
    values = np.linalg.eigvalsh(hessian[:48, :48])
    numbers = {(entry.metric, entry.block): entry.value for entry in found.estimates}
    assert numbers["lambda_max", "first"] == pytest.approx(values[-1], rel=1e-9)
    assert numbers["trace", "first"] == pytest.approx(values.sum(), rel=1e-9)
    assert ("gradient_norm", "biases") in numbers
    assert ("loss", "first") not in numbers


class DenseForms(AbstractForms):
    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    def forms(self, vectors: np.ndarray) -> np.ndarray:
        return np.einsum("pk,pk->k", vectors, self.matrix @ vectors)


def test_the_interval_of_the_ggn_share_holds_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    steep = random.standard_normal((320, 320)) / np.sqrt(np.arange(1, 321))[:, None]
    noise = random.standard_normal((320, 320))
    ggn = steep.T @ steep
    hessian = ggn + 0.05 * (noise + noise.T) + 0.3 * np.eye(320)
    wanted = share_of(float(np.trace(ggn)), float(np.trace(hessian)))
    held = 0
    for seed in range(300):
        found = ggn_share(DenseForms(ggn), estimate_moments(DenseOperator(hessian), seed=seed), confidence=0.95)
        held += found.low <= wanted <= found.high
    assert 0.912 <= held / 300 <= 0.988


def test_gauss_newton_forms_are_those_of_the_matrix_also_by_an_output() -> None:
    problem = network(4, weight_decay=0.1)
    vectors = np.random.default_rng(0).standard_normal((problem.numel, 5))
    wanted = np.einsum("pk,pk->k", vectors, gauss_newton(problem) @ vectors)
    names = [entry.name for entry in problem.parameters()]
    np.testing.assert_allclose(GaussNewtonForms(problem, names).forms(vectors), wanted, rtol=1e-9)
    wrapped = nn.ModuleDict({"net": problem.model})
    named = disthess.Problem(
        wrapped,
        objective=lambda model, batch: nn.functional.cross_entropy(model["net"](batch[0]), batch[1]),
        batches=problem.batches,
        weight_decay=0.1,
        output="net",
    )
    names = [entry.name for entry in named.parameters()]
    np.testing.assert_allclose(GaussNewtonForms(named, names).forms(vectors), wanted, rtol=1e-9)


def test_where_the_model_ends_must_be_known_and_be_its_end() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    x = torch.ones(3, 2).double()
    for output, said in ((None, "where the model ends"), ("0", "parameters act after"), ("9", "no module")):
        problem = disthess.Problem(model, objective=lambda net, b: net(b).square().mean(), batches=[x], output=output)
        with pytest.raises(ProblemError, match=said):
            GaussNewtonForms(problem, ["0.weight", "1.weight"])
    found = audited(problem)
    share = next(entry for entry in found.estimates if entry.metric == "ggn_share")
    assert math.isnan(share.value)
    assert "no module" in share.how


def test_kinks_are_counted() -> None:
    problem = network(4, nn.ReLU)
    with torch.no_grad():
        problem.model[0].weight[1] = 0
        problem.model[0].bias[1] = 0
    found = audited(problem, measure={"metrics": ["kinks"]})
    assert found.estimates[0].value == 30.0
    assert "relu" in found.estimates[0].how


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    problem = network(16)
    section = {
        "metrics": ["trace", "lambda_max", "negative_mass", "ggn_share", "newton_decrement"],
        "density_steps": 10,
    }
    once, again = (audited(problem, measure={**section, "seed": 3}).estimates for _ in range(2))
    assert once == again
    other = audited(problem, measure={**section, "seed": 4}).estimates
    same = {entry.metric for entry, mate in zip(once, other, strict=True) if entry.value == mate.value}
    # Of 400 entries the extreme eigenvalues come from the matrix, and the Krylov space starts from the gradient.
    assert same == {"lambda_max", "newton_decrement"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"measure": {"metrics": ["lamda_max"]}}, "did you mean lambda_max"),
        ({"measure": {"block_metrics": ["loss"]}}, "block_metrics names 'loss'"),
        ({"measure": {"parameters": "nothing"}}, "matches no trainable parameter"),
        ({"tiles": {"a": ["*", "nothing"]}}, "matches no trainable parameter"),
        ({"blocks": {"a": "9.*"}}, "matches no trainable parameter"),
        ({"couplings": {"sections": {"a": "0.weight[0:2]", "b": "0.weight[1:3]"}}}, "entries of another section"),
        ({"measure": {"device": "meta"}}, "cpu or cuda"),
    ],
)
def test_names_that_match_nothing_are_refused_before_anything_runs(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_subject(network(4), config(**sections))


def test_a_tile_too_large_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(3000, 3000)
    problem = disthess.Problem(model, loss="mse", batches=[(torch.ones(1, 3000), torch.ones(1, 3000))])
    with pytest.raises(ConfigError, match="products are allowed"):
        make_subject(problem, config(tiles={"all": ["weight[0:10]", "weight[0:10]"]}))
