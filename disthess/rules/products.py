"""Products of matrices by whichever of torch's two libraries multiplies faster on this processor.

Torch multiplies float32 matrices on the CPU by MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which torch has
for its convolutions, uses AVX-512 where it is: a core of an EPYC 9005 does 108 GFLOP/s by the one and 240 by the other. It is asked
by the operation that torch's own compiler asks it by, and only where it was measured to gain: float32, AVX-512 and not Intel's,
matrices not too small, nothing to be differentiated. Everywhere else these are ``torch.matmul`` and its kin, which write with
``out=`` since torch's FLOP counter does not see what is written in place. What oneDNN multiplies here it does not see either.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

LEAST = 1 << 20
"""Multiply-adds from which asking oneDNN pays: a call of it takes some ten microseconds more."""

PIECE = 1 << 20
"""Entries of a sum that oneDNN's products are made for at a time: it cannot add to what is there, and a piece stays in cache."""

PIECE_ROWS = 32
"""Rows of such a piece, at least, where the sum has as many: fewer do not pay for what oneDNN does to the right operand first."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left right``: ``[..., k]`` by ``[k, n]``."""
    if _gains(left, right):
        # A right operand with gaps between its rows takes oneDNN a thousand times as long.
        dense = right if right.is_contiguous() or right.T.is_contiguous() else right.contiguous()
        found: Tensor = torch.ops.mkldnn._linear_pointwise(left, dense.T, None, "none", [], "")
        return found
    return torch.matmul(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left right`` in place: ``[m, n]``, ``[m, k]`` by ``[k, n]``."""
    if _gains(left, right):
        width = max(1, PIECE // PIECE_ROWS)
        for first in range(0, right.shape[1], width):
            columns = slice(first, first + width)
            piece = right[:, columns]
            height = max(1, PIECE // piece.shape[1])
            for start in range(0, len(left), height):
                total[start : start + height, columns] += product(left[start : start + height], piece)
    else:
        torch.addmm(total, left, right, out=total)


def add_products(totals: Tensor, left: Tensor, rights: Tensor) -> None:
    """``totals[u] += left rights[u]`` in place: ``[u, m, n]``, ``[m, k]`` (or one for each u) by ``[u, k, n]``."""
    lefts = left.expand(len(totals), -1, -1)
    if _gains(lefts[0], rights[0]):
        for total, one, right in zip(totals, lefts, rights, strict=True):
            add_product(total, one, right)
    else:
        torch.baddbmm(totals, lefts, rights, out=totals)


def _gains(left: Tensor, right: Tensor) -> bool:
    return (
        left.numel() * right.shape[1] >= LEAST
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and not torch.is_grad_enabled()
        and has_faster_library()
    )


@functools.cache
def has_faster_library() -> bool:
    """Whether this processor has AVX-512, is not Intel's, and torch comes with oneDNN."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and _vendor() not in ("", "GenuineIntel")


def _vendor() -> str:
    """As Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
