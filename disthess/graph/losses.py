"""Losses by elementary operations, traced in place of torch's fused ones: rows first, then the reduction, which is thus seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2


def _reduce(rows: Tensor, reduction: int) -> Tensor:
    return rows if reduction == NONE else rows.mean() if reduction == MEAN else rows.sum()


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Log-softmax, then the rows, then the reduction; ``mean`` divides by the total weight of the targets, as torch does."""
    axis = 0 if input.ndim == 1 else 1
    logs = torch.log_softmax(input, axis)
    classes = input.shape[axis]
    if target.is_floating_point():
        smooth = target * (1 - label_smoothing) + label_smoothing / classes if label_smoothing else target
        weighted = logs * smooth
        if weight is not None:
            weighted = weighted * weight.reshape([-1] + [1] * (input.ndim - axis - 1))
        rows = -weighted.sum(axis)
        if reduction == NONE:
            return rows
        total = rows.sum()
        positions = input.numel() // classes
        return total if reduction == SUM else total / positions
    keep = target != ignore_index
    index = torch.where(keep, target, torch.zeros_like(target))
    share = keep.to(input.dtype)
    if weight is not None:
        share = share * weight[index]
    rows = -logs.gather(axis, index.unsqueeze(axis)).squeeze(axis) * share
    if label_smoothing:
        spread = logs if weight is None else logs * weight.reshape([-1] + [1] * (input.ndim - axis - 1))
        even = -spread.sum(axis) * keep.to(input.dtype)
        rows = rows * (1 - label_smoothing) + even * (label_smoothing / classes)
    if reduction == NONE:
        return rows
    return rows.sum() if reduction == SUM else rows.sum() / share.sum()


def nll_loss(
    self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN, ignore_index: int = -100
) -> Tensor:
    """The rows ``-weight[t] * x[t]``, then the reduction."""
    axis = 0 if self.ndim == 1 else 1
    keep = target != ignore_index
    index = torch.where(keep, target, torch.zeros_like(target))
    share = keep.to(self.dtype)
    if weight is not None:
        share = share * weight[index]
    rows = -self.gather(axis, index.unsqueeze(axis)).squeeze(axis) * share
    if reduction == NONE:
        return rows
    return rows.sum() if reduction == SUM else rows.sum() / share.sum()


def mse_loss(self: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """Squared differences, reduced."""
    return _reduce((self - target).square(), reduction)


def l1_loss(self: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """Absolute differences, reduced."""
    return _reduce((self - target).abs(), reduction)


def smooth_l1_loss(self: Tensor, target: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    """Quadratic below ``beta``, linear above, reduced."""
    difference = self - target
    gap = difference.abs()
    # The square of the difference itself: that of its magnitude would look like a kink at 0.
    inside = 0.5 / beta * difference.square() if beta else gap
    return _reduce(torch.where(gap < beta, inside, gap - 0.5 * beta) if beta else gap, reduction)


def huber_loss(self: Tensor, target: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """Quadratic up to ``delta``, linear above, reduced."""
    difference = self - target
    gap = difference.abs()
    outside = delta * (gap - 0.5 * delta)
    return _reduce(torch.where(gap <= delta, 0.5 * difference.square(), outside), reduction)


def binary_cross_entropy(self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN) -> Tensor:
    """Cross-entropy of probabilities; logs are cut at -100, as torch does."""
    rows = -(target * self.log().clamp(min=-100) + (1 - target) * (1 - self).log().clamp(min=-100))
    return _reduce(rows if weight is None else rows * weight, reduction)


def binary_cross_entropy_with_logits(
    self: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """Cross-entropy of logits by log-sigmoid."""
    positive = target if pos_weight is None else pos_weight * target
    rows = -(positive * torch.nn.functional.logsigmoid(self) + (1 - target) * torch.nn.functional.logsigmoid(-self))
    return _reduce(rows if weight is None else rows * weight, reduction)


def soft_margin_loss(self: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """``log(1 + exp(-t x))``, reduced."""
    return _reduce(-torch.nn.functional.logsigmoid(target * self), reduction)


def kl_div(self: Tensor, target: Tensor, reduction: int = MEAN, *, log_target: bool = False) -> Tensor:
    """``t (log t - x)``, reduced."""
    if log_target:
        return _reduce(target.exp() * (target - self), reduction)
    return _reduce(torch.special.xlogy(target, target) - target * self, reduction)


def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """``|x1 - x2 + eps|_p`` over the last axis."""
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = MEAN,
) -> Tensor:
    """``max(0, margin + |a - p| - |a - n|)``, reduced, so that its hinge is seen."""
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, pairwise_distance(positive, negative, p, eps))
    return _reduce(torch.clamp_min(margin + near - far, 0.0), reduction)


def lowered_losses() -> dict[Any, Callable[..., Any]]:
    """Operation overload to the function traced in its place."""
    aten = torch.ops.aten
    return {
        aten.cross_entropy_loss.default: cross_entropy_loss,
        aten.nll_loss_nd.default: nll_loss,
        aten.nll_loss.default: nll_loss,
        aten.nll_loss2d.default: nll_loss,
        aten.mse_loss.default: mse_loss,
        aten.l1_loss.default: l1_loss,
        aten.smooth_l1_loss.default: smooth_l1_loss,
        aten.huber_loss.default: huber_loss,
        aten.binary_cross_entropy.default: binary_cross_entropy,
        aten.binary_cross_entropy_with_logits.default: binary_cross_entropy_with_logits,
        aten.soft_margin_loss.default: soft_margin_loss,
        aten.kl_div.default: kl_div,
        aten.pairwise_distance.default: pairwise_distance,
        aten.triplet_margin_loss.default: triplet_margin_loss,
    }
