"""What is tied at a problem's parameters, over all its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from disthess.formalism.kinks import KinkReport, find_kinks
from disthess.formalism.patterns import nearby
from disthess.graph.program import Program
from disthess.graph.run import run_graph
from disthess.problem import Problem, batch_tensors, sample_count

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
"""How close to a kink counts, relative to the largest magnitude of the operation's input."""


def kinks_of_problem(problem: Problem, programs: Sequence[Program], names: Sequence[str]) -> tuple[KinkReport, ...]:
    """Nodes with tied entries, entries and samples added up over batches; five forward passes of each batch.

    Args:
        problem: In the dtype of the run.
        programs: One for each batch.
        names: The parameters that move: a tie that none of them can undo is no kink.
    """
    tensors = {parameter.name: parameter.tensor.detach() for parameter in problem.parameters()}
    moved = [
        {**tensors, **near}
        for near in nearby({name: tensor for name, tensor in tensors.items() if name in set(names)}, 2)
    ]
    found: dict[str, KinkReport] = {}
    with torch.no_grad():
        for program, batch in zip(programs, problem.batches, strict=True):
            inputs = batch_tensors(batch)
            values = run_graph(program.graph, tensors, inputs, program.constants)
            others = [run_graph(program.graph, near, inputs, program.constants) for near in moved]
            samples = sample_count(batch) if program.graph.dynamic else 1
            for report in find_kinks(program.graph, values, others, samples, TOLERANCE[problem.dtype]):
                found[report.node] = _added(found.get(report.node), report)
    return tuple(found.values())


def _added(old: KinkReport | None, new: KinkReport) -> KinkReport:
    if old is None:
        return new
    samples = None if old.samples is None or new.samples is None else old.samples + new.samples
    return dataclasses.replace(old, entries=old.entries + new.entries, samples=samples)
