"""Why a block failed its check: whether the weights lie on a kink, and which operation is tied there."""

from __future__ import annotations

from collections.abc import Collection

import torch

from disthess.errors import DisthessError
from disthess.formalism.patterns import nearby
from disthess.formalism.report import kinks_of_problem
from disthess.graph.program import build_programs
from disthess.problem import Problem

_SHOWN = 3
"""Tied operations that are named; of others only how many they are."""


def moved(problem: Problem, names: Collection[str]) -> Problem:
    """A copy in float64 whose parameters of these names lie beside the problem's own: off a kink, if they are on one."""
    device = problem.parameters()[0].tensor.device
    copy = problem.to(torch.float64, device)
    tensors = {entry.name: entry.tensor for entry in copy.parameters() if entry.name in set(names)}
    with torch.no_grad():
        for name, value in nearby(tensors)[0].items():
            tensors[name].copy_(value)
    return copy


def tied_operations(problem: Problem, names: Collection[str]) -> str:
    """Which operations are tied where these parameters are, in words; that they could not be found, where that is so."""
    try:
        found = kinks_of_problem(problem, build_programs(problem, frozenset(names)), tuple(names))
    except (DisthessError, RuntimeError, NotImplementedError) as reason:
        return (
            f"which operation is tied is not known, the model cannot be captured: {' '.join(str(reason).split())[:120]}"
        )
    if not found:
        return "no operation is tied to within rounding, so that a kink is near, or an operation jumps that is not known to"
    told = []
    for entry in found[:_SHOWN]:
        samples = "" if entry.samples is None else f" in {entry.samples:,} sample{'s' if entry.samples != 1 else ''}"
        told.append(
            f"{entry.node} ({entry.op.split('.')[1]}) is tied at {entry.entries:,} "
            f"entr{'ies' if entry.entries != 1 else 'y'}{samples}, and torch takes {entry.torch_takes}"
        )
    more = len(found) - _SHOWN
    return "; ".join(told) + (f"; and {more} more operation{'s are' if more > 1 else ' is'} tied" if more > 0 else "")
