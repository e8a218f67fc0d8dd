"""Rank bounds against the ranks of the oracle's blocks, and truncation of every block of a store."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Case, cases
from torch import Tensor, nn

import disthess
from disthess.errors import ConfigError
from disthess.reduce import truncate


def blocks_of(problem: disthess.Problem) -> dict[tuple[str, str], np.ndarray]:
    whole = disthess.reference_hessian(problem)
    spans, start = {}, 0
    for parameter in problem.parameters():
        spans[parameter.name] = slice(start, start + parameter.tensor.numel())
        start += parameter.tensor.numel()
    return {(a, b): whole[spans[a], spans[b]] for a in spans for b in spans}


TYPICAL = (
    "mlp_skip_gate",
    "mlp_two_batches_sum",
    "rnn",
    "attention",
    "batch_norm_train",
    "tied_language_model",
    "two_heads",
)


@pytest.mark.parametrize("case", cases(TYPICAL, graph=True))
def test_no_block_has_a_higher_rank(case: Case) -> None:
    problem = case.make()
    bounds = disthess.rank_bounds(problem)
    assert bounds or len(problem.parameters()) == 1
    for pair, values in blocks_of(problem).items():
        if pair in bounds and values.any():
            singular = np.linalg.svd(values, compute_uv=False)
            assert (singular > 1e-9 * singular[0]).sum() <= bounds[pair], pair


class Waist(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(1, 6)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        values = torch.tanh(self.first(x))
        narrow = torch.tanh(self.third(torch.tanh(self.second(values))))
        return narrow + x * values.sum(1, keepdim=True) if self.skip else narrow


def waist(skip: bool, batches: int = 1) -> disthess.Problem:
    torch.manual_seed(0)
    data = [(torch.randn(3, 6).double(), torch.randn(3, 6).double()) for _ in range(batches)]
    return disthess.Problem(Waist(skip).double(), loss="mse", batches=data)


def test_a_chain_has_the_width_of_its_waist() -> None:
    """Three samples through one unit: rank 3, which is reached."""
    problem = waist(skip=False)
    bounds = disthess.rank_bounds(problem)
    assert bounds["first.weight", "third.weight"] == bounds["third.weight", "first.weight"] == 3
    singular = np.linalg.svd(blocks_of(problem)["first.weight", "third.weight"], compute_uv=False)
    assert singular[2] > 1e-6 > 1e-12 > singular[3]
    assert disthess.rank_bounds(waist(skip=False, batches=2))["first.weight", "third.weight"] == 6


def test_a_way_around_the_waist_counts() -> None:
    problem = waist(skip=True)
    bounds = disthess.rank_bounds(problem)
    assert bounds["first.weight", "third.weight"] > 3
    singular = np.linalg.svd(blocks_of(problem)["first.weight", "third.weight"], compute_uv=False)
    assert 3 < (singular > 1e-10 * singular[0]).sum() <= bounds["first.weight", "third.weight"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> disthess.reduce.hessian_store.HessianStore:  # type: ignore[name-defined]
    return disthess.compute(waist(skip=True), tmp_path_factory.mktemp("ranks") / "a.zarr", progress=False)


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 0}, {"tolerance": 0.01}, {"rank": 4, "tolerance": 0.02}])
def test_truncated_blocks_know_their_error(store, options) -> None:  # type: ignore[no-untyped-def]
    found, whole = disthess.low_rank_blocks(store, **options), store.dense()
    form = found.apply(np.eye(store.numel))
    np.testing.assert_allclose(form, form.T, atol=1e-14)
    assert np.linalg.norm(whole - form) == pytest.approx(found.error, rel=1e-10)
    assert found.relative_error == pytest.approx(found.error / np.linalg.norm(whole))
    assert np.linalg.norm(whole - form, 2) <= found.spectral_bound * (1 + 1e-12)
    # Weyl: no eigenvalue moves by more.
    moved = np.abs(np.linalg.eigvalsh(whole) - np.linalg.eigvalsh(form)).max()
    assert moved <= found.spectral_bound * (1 + 1e-12)
    assert max(found.ranks().values()) <= options.get("rank", store.numel)
    np.testing.assert_allclose(found.operator() @ np.ones(store.numel), form @ np.ones(store.numel), atol=1e-12)


def test_large_blocks_are_sketched(store, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The same numbers, nearly, and the error of what was found, exactly."""
    whole = store.dense()
    full = disthess.low_rank_blocks(store, rank=3)
    monkeypatch.setattr(truncate, "FULL_SIDE", 4)
    found = disthess.low_rank_blocks(store, rank=3)
    form = found.apply(np.eye(store.numel))
    assert np.linalg.norm(whole - form) == pytest.approx(found.error, rel=1e-10)
    assert full.error <= found.error <= 1.2 * full.error
    assert np.linalg.norm(whole - form, 2) <= found.spectral_bound * (1 + 1e-12)


def test_truncation_at_the_bounds_is_free(store) -> None:  # type: ignore[no-untyped-def]
    found = disthess.low_rank_blocks(store, bounds=disthess.rank_bounds(waist(skip=True)))
    assert found.relative_error < 1e-14
    assert found.ranks()["second.weight", "third.weight"] <= 3


def test_something_must_be_asked_for(store) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="rank_bounds"):
        disthess.low_rank_blocks(store)
    with pytest.raises(ConfigError, match="not be negative"):
        disthess.low_rank_blocks(store, rank=-1)
