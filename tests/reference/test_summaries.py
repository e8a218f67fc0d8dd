"""Summaries of blocks against the eigenvalues of autograd's dense Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import disthess
from disthess.blocks import find_blocks
from disthess.errors import ConfigError, ProblemError
from disthess.linalg.operator import DenseOperator
from disthess.linalg.summary import SUMMARY, Effort, summarise_operator, summary_bytes, summary_products

METRICS = tuple(metric for metric in SUMMARY if metric != "density")


def network(width: int = 18) -> disthess.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    ).double()
    x, y = torch.randn(40, 6).double(), torch.randint(0, 3, (40,))
    return disthess.Problem(model, loss="cross_entropy", batches=[(x, y)])


def truth(matrix: np.ndarray) -> dict[str, float]:
    values = np.linalg.eigvalsh(matrix)
    square, norm = float((values**2).sum()), float(np.abs(values).max())
    return {
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        "trace": float(values.sum()),
        "frobenius": float(np.sqrt(square)),
        "effective_rank": float(values.sum() ** 2 / square),
        "stable_rank": square / norm**2,
        "negative_mass": float((values < -1e-9 * norm).mean()),
    }


def test_every_number_of_every_block_is_right_or_within_its_interval() -> None:
    problem = network()
    dense = disthess.reference_hessian(problem)
    chosen = problem.parameters()
    blocks = {"everything": "*", "first rows": "*.weight[0:3]", "biases": ["*.bias"], "middle": "2.*"}
    places = find_blocks(problem.model, chosen, blocks)
    assert len(np.arange(problem.numel)[places["first rows"]]) == 3 * (6 + 18 + 18)
    for block in disthess.summarise(
        problem, blocks=blocks, effort=Effort(confidence=0.999, density_probes=3, density_steps=20)
    ):
        part = dense[places[block.name]][:, places[block.name]]
        wanted = truth(np.asarray(part))
        for metric in METRICS:
            found = block.find(metric)
            assert found is not None
            slip = 1e-9 * max(1.0, abs(wanted[metric]))
            assert found.low - slip <= wanted[metric] <= found.high + slip, (block.name, metric)
            if block.size <= 300:
                assert found.value == pytest.approx(wanted[metric], rel=1e-9, abs=1e-9)
                assert found.exact
        assert block.density is not None
        assert np.trapezoid(block.density.value, block.density.grid) == pytest.approx(1.0, abs=1e-2)


def test_groupings_cover_every_entry_once_and_roles_are_known() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    problem = disthess.Problem(layer, loss="mse", batches=[(torch.ones(1, 2, 8), torch.ones(1, 2, 8))])
    for kind in ("parameters", "modules", "roles"):
        places = find_blocks(layer, problem.parameters(), kind)
        every = np.concatenate([np.arange(problem.numel)[where] for where in places.values()])
        np.testing.assert_array_equal(np.sort(every), np.arange(problem.numel))
    assert list(places) == ["q", "k", "v", "o", "up", "down", "norms"]
    named = find_blocks(layer, problem.parameters(), {"q": "@q", "same": ["*.in_proj_*[0:8]"]})
    np.testing.assert_array_equal(named["q"], named["same"])


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"a": "nothing.*"}, "matches no trainable parameter"),
        ({"a": "0.weight[99:100]"}, "outside an axis"),
        ({"a": "@gate"}, "is the role"),
        ("layers", "must be one of parameters, modules, roles"),
        ("roles", "no parameter has one of the roles"),
    ],
)
def test_blocks_that_are_none_are_refused(blocks: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        disthess.summarise(network(), blocks=blocks)  # type: ignore[arg-type]


def test_efforts_and_metrics_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 36"):
        disthess.summarise(network(), effort=Effort(probes=10))
    with pytest.raises(ConfigError, match="unknown metrics"):
        disthess.summarise(network(), metrics=["hue"])
    with pytest.raises(ConfigError, match="knows no names"):
        disthess.summarise(DenseOperator(np.eye(3)))


def test_an_operator_is_summarised_by_places_and_costs_what_was_said() -> None:
    matrix = np.random.default_rng(0).standard_normal((700, 700))
    matrix = matrix + matrix.T
    blocks = {"half": slice(0, 350), "odd": np.arange(1, 700, 2)[:310]}
    for block in disthess.summarise(DenseOperator(matrix), blocks=blocks):
        part = matrix[blocks[block.name]][:, blocks[block.name]]
        assert block.value("lambda_max") == pytest.approx(np.linalg.eigvalsh(part)[-1], rel=1e-6)
        assert block.products <= sum(summary_products(block.size, Effort()).values())
    whole = summarise_operator(DenseOperator(matrix))
    assert whole.products <= sum(summary_products(700, Effort()).values())
    assert summary_products(700, Effort(), ["trace"]) == {"moments": 48}
    assert summary_products(200, Effort(), ["trace"]) == {"dense": 200}
    assert summary_products(700, Effort(), ["loss"]) == {}


def test_without_room_for_a_basis_the_ends_come_from_the_quadratures() -> None:
    values = np.concatenate([np.linspace(-0.1, 0.1, 698), [-2.0, 5.0]])
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((700, 700)))[0]
    effort = Effort(memory_bytes=100_000)
    found = summarise_operator(DenseOperator(axes * values @ axes.T), effort=effort)
    assert found.value("lambda_max") == pytest.approx(5.0, rel=1e-9)
    assert found.value("lambda_min") == pytest.approx(-2.0, rel=1e-9)
    assert "Lanczos runs" in found.estimates[3].how
    assert summary_bytes(700, effort) < 48 * 700 * 8 * 3


def test_the_same_seed_gives_the_same_numbers() -> None:
    matrix = np.diag(np.linspace(-1.0, 3.0, 400))
    once, again, other = (summarise_operator(DenseOperator(matrix), effort=Effort(seed=seed)) for seed in (1, 1, 2))
    assert once.estimates == again.estimates
    assert once.estimates != other.estimates


@pytest.mark.parametrize("ask", [disthess.summarise, disthess.coupling_map, disthess.operator])
def test_what_has_no_hessian_is_refused(ask: Any) -> None:
    """NaN in the data, and an objective that is random from call to call: neither may end as a number."""
    x, y = torch.arange(12.0).reshape(4, 3).sin(), torch.zeros(4, 2)
    more = {"executor": "serial"} if ask is disthess.operator else {}
    broken = disthess.Problem(torch.nn.Linear(3, 2), loss="mse", batches=[(x * float("nan"), y)])
    with pytest.raises(ProblemError, match="NaN"):
        ask(broken, **more)
    random = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.Linear(2, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2)
    ).train()
    problem = disthess.Problem(random, loss="mse", batches=[(x, y)])
    # An operator looks at its batches when it is first multiplied by.
    multiply = (lambda: ask(problem, **more).matmat(np.ones((330, 1)))) if more else (lambda: ask(problem))
    with pytest.raises(ProblemError):
        multiply()
