"""Losses of torch.nn and some by hand, on a small net, whole and split into batches, against the dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disthess
from disthess.errors import DisthessError

G = torch.Generator().manual_seed(7)
REAL = torch.randn(6, 3, generator=G, dtype=torch.float64)
SIGNS = torch.randint(0, 2, (6, 3), generator=G).double() * 2 - 1
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])
PADDED = torch.tensor([0, -100, 1, -100, -100, 2])
SOFT = torch.softmax(torch.randn(6, 3, generator=G, dtype=torch.float64), 1)
HARD = torch.randint(0, 2, (6, 3), generator=G).double()
COUNTS = torch.randint(0, 5, (6, 3), generator=G).double()
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
TOKENS = torch.randint(0, 3, (6, 4), generator=G)

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, Tensor]] = {
    "mse": (F.mse_loss, REAL),
    "mse_sum": (nn.MSELoss(reduction="sum"), REAL),
    "cross_entropy": (F.cross_entropy, CLASSES),
    "cross_entropy_sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "cross_entropy_ignore_index": (F.cross_entropy, PADDED),
    "cross_entropy_label_smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    "cross_entropy_class_weights": (nn.CrossEntropyLoss(weight=WEIGHTS), CLASSES),
    "cross_entropy_everything": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1, ignore_index=-100), PADDED),
    "cross_entropy_soft_targets": (F.cross_entropy, SOFT),
    "nll": (lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), CLASSES),
    "bce": (lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), HARD),
    "bce_with_logits": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), HARD),
    "hinge": (lambda z, y: torch.relu(1 - y * z).mean(), SIGNS),
    "hinge_by_clamp": (lambda z, y: (1 - y * z).clamp(min=0).sum(), SIGNS),
    "squared_hinge": (lambda z, y: torch.relu(1 - y * z).square().mean(), SIGNS),
    "multi_class_hinge": (lambda z, y: torch.relu(1 + z - z.gather(1, y[:, None])).sum(1).mean(), CLASSES),
    "kl_div": (lambda z, y: F.kl_div(F.log_softmax(z, 1), y, reduction="batchmean"), SOFT),
    "poisson_nll": (lambda z, y: F.poisson_nll_loss(z, y), COUNTS),
    "poisson_nll_full": (lambda z, y: F.poisson_nll_loss(z.exp(), y, log_input=False, full=True), COUNTS),
    "gaussian_nll": (lambda z, y: F.gaussian_nll_loss(z[:, :1], y[:, :1], F.softplus(z[:, 1:2])), REAL),
    "huber": (nn.HuberLoss(delta=0.7), REAL),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.5), REAL),
    "l1": (F.l1_loss, REAL),
    "soft_margin": (F.soft_margin_loss, SIGNS),
    "hinge_embedding": (lambda z, y: F.hinge_embedding_loss(z.square(), y), SIGNS),
    "cosine_embedding": (lambda z, y: F.cosine_embedding_loss(z, REAL[: len(z)], y[:, 0], margin=-0.9), SIGNS),
    "triplet_margin": (lambda z, y: F.triplet_margin_loss(z, y, y.flip(1), margin=3.0), REAL),
    "margin_ranking": (lambda z, y: F.margin_ranking_loss(z[:, 0], z[:, 1], y[:, 0], margin=0.3), SIGNS),
    "multilabel_soft_margin": (F.multilabel_soft_margin_loss, HARD),
    "multi_margin": (F.multi_margin_loss, CLASSES),
    "focal": (lambda z, y: ((1 - F.softmax(z, 1).gather(1, y[:, None])) ** 2 * -F.log_softmax(z, 1).gather(1, y[:, None])).mean(), CLASSES),
    "log_cosh": (lambda z, y: (z - y).cosh().log().mean(), REAL),
    "quantile": (lambda z, y: torch.maximum(0.3 * (y - z), -0.7 * (y - z)).mean(), REAL),
    "dice": (lambda z, y: (1 - 2 * (z.sigmoid() * y).sum(1) / (z.sigmoid() + y).sum(1)).mean(), HARD),
}  # fmt: skip
TORCH_IS_WRONG = {"multi_margin"}
"""torch has no double backward here (or a wrong one): central differences of the gradient are the oracle."""
TYPICAL = (
    "mse",
    "cross_entropy_ignore_index",
    "cross_entropy_everything",
    "hinge",
    "huber",
    "gaussian_nll",
    "bce",
    "multi_margin",
)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def inputs() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def oracle(problem: disthess.Problem, name: str) -> np.ndarray:
    if name not in TORCH_IS_WRONG:
        return disthess.reference_hessian(problem)
    from disthess import hvp

    bound = problem.to(torch.float64)
    names = [parameter.name for parameter in bound.parameters()]
    return hvp.gradient_difference_products(bound, names, torch.eye(bound.numel, dtype=torch.float64), 1e-5).numpy()


def close(store: Any, wanted: np.ndarray, tolerance: float) -> bool:
    return float(np.linalg.norm(store.dense() - wanted)) <= tolerance * max(float(np.linalg.norm(wanted)), 1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss(name: str, tmp_path: Path) -> None:
    loss, targets = LOSSES[name]
    problem = disthess.Problem(net(), loss=loss, batches=[(inputs(), targets)])
    parts = ("hessian",) if name in TORCH_IS_WRONG else ("hessian", "ggn")
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=parts, progress=False)
    tolerance = 1e-7 if name in TORCH_IS_WRONG else 1e-10
    assert close(store, oracle(problem, name), tolerance)
    assert store.certificate().passed
    if "ggn" in parts:
        ggn = disthess.reference_hessian(problem, "ggn")
        assert np.linalg.norm(store.dense("ggn") - ggn) <= 1e-10 * max(np.linalg.norm(ggn), 1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow) for name in LOSSES]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_split_into_batches(name: str, reduction: str, tmp_path: Path) -> None:
    loss, targets = LOSSES[name]
    x = inputs()
    batches = [(x[:2], targets[:2]), (x[2:], targets[2:])]
    problem = disthess.Problem(net(), loss=loss, batches=batches, reduction=reduction)
    weights = (2 / 6, 4 / 6) if reduction == "mean" else (1.0, 1.0)
    apart = [disthess.Problem(problem.model, loss=loss, batches=[batch]) for batch in batches]
    wanted = sum(weight * oracle(one, name) for weight, one in zip(weights, apart, strict=True))
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert close(store, wanted, 1e-7 if name in TORCH_IS_WRONG else 1e-10)


def test_splitting_padded_targets_needs_weights_by_what_is_not_padded(tmp_path: Path) -> None:
    x = inputs()
    whole = disthess.Problem(net(), loss="cross_entropy", batches=[(x, PADDED)])
    batches = [(x[:3], PADDED[:3]), (x[3:], PADDED[3:])]
    split = disthess.Problem(net(), loss="cross_entropy", batches=batches, weights=[2 / 3, 1 / 3])
    store = disthess.compute(split, tmp_path / "run.zarr", progress=False)
    assert close(store, disthess.reference_hessian(whole), 1e-12)


class PerToken(nn.Module):
    """Logits ``[N, C, T]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids))).transpose(1, 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_of_tokens_with_padding(reduction: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(2))
    targets = TOKENS.clone()
    targets[0, 2:], targets[3, 1:] = -100, -100
    problem = disthess.Problem(PerToken().double(), loss="cross_entropy", batches=[(ids, targets)], reduction=reduction)
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=("hessian", "ggn"), progress=False)
    assert close(store, disthess.reference_hessian(problem), 1e-10)
    assert disthess.psd_check(store).verdict == "positive semi-definite"


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "hinge"])
def test_named_losses_are_torchs(loss: str, tmp_path: Path) -> None:
    x = inputs()
    targets = {"mse": REAL, "cross_entropy": CLASSES, "hinge": SIGNS}[loss]
    by_hand = {
        "mse": F.mse_loss, "cross_entropy": F.cross_entropy, "hinge": lambda z, y: torch.relu(1 - y * z).mean()
    }[loss]  # fmt: skip
    named = disthess.Problem(net(), loss=loss, batches=[(x, targets)])
    wanted = disthess.reference_hessian(disthess.Problem(net(), loss=by_hand, batches=[(x, targets)]))
    assert close(disthess.compute(named, tmp_path / "run.zarr", progress=False), wanted, 1e-12)


def test_ctc_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lengths = torch.full((2,), 5), torch.tensor([2, 1])
    targets = torch.tensor([[1, 2], [3, 0]])

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(z.log_softmax(-1).transpose(0, 1), y, *lengths)

    problem = disthess.Problem(model, loss=loss, batches=[(x, targets)])
    with pytest.raises(DisthessError, match="ctc"):
        disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert not (tmp_path / "run.zarr").exists()
