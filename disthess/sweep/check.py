"""Self-checks at capture: every node without a rule of its own is compared with central differences, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disthess.errors import RuleError
from disthess.graph.ir import Node
from disthess.graph.program import Program
from disthess.problem import Problem, batch_tensors
from disthess.rules.generic import check_rule
from disthess.rules.table import has_rule, refusal, rule_for
from disthess.sweep.frame import Frame
from disthess.sweep.primal import compute_primal
from disthess.types import Span

CHECKED_SAMPLES = 4
"""Samples a check looks at: enough to be typical, few enough to be quick and to meet no kink."""


def check_rules(problem: Problem, programs: Sequence[Program]) -> None:
    """Check the generic rule of every operation that has none of its own, at the problem's own values, where it has some.

    Args:
        problem: In the run's dtype.
        programs: One per batch.

    Raises:
        RuleError: An operation is refused, or its second derivative disagrees with central differences.
    """
    seen: set[int] = set()
    for index, program in enumerate(programs):
        if id(program) in seen:
            continue
        seen.add(id(program))
        for node in _live(program):
            advice = refusal(node.op) or rule_for(node.op).objection(node)
            if advice is not None:
                raise RuleError(f"{node.name} is {node.op}, which has no Hessian here: {advice}")
        doubtful = [node.index for node in _live(program) if not has_rule(node.op)]
        if not doubtful or problem.without_values:
            continue
        parameters = {parameter.name: parameter.tensor for parameter in problem.parameters()}
        inputs = batch_tensors(problem.batches[index])
        with torch.enable_grad():
            primal = compute_primal(program.graph, parameters, inputs, program.constants, problem.weights[index])
        frame = Frame(primal, Span(0, min(CHECKED_SAMPLES, primal.samples)))
        checked: set[tuple[object, ...]] = set()
        for number in doubtful:
            node = program.graph.nodes[number]
            active = tuple(slot for slot, ref in enumerate(frame.slots(number)) if program.graph.nodes[ref].live)
            key = (node.op, node.output, node.shape, repr(node.kwargs))
            if key not in checked:
                checked.add(key)
                check_rule(frame.call(number), rule_for(node.op), active, node.name)


def doubtful_operations(programs: Sequence[Program]) -> tuple[str, ...]:
    """Operations whose rule `check_rules` compares with central differences, sorted."""
    return tuple(sorted({node.op for program in programs for node in _live(program) if not has_rule(node.op)}))


def _live(program: Program) -> list[Node]:
    return [node for node in program.graph.nodes if node.live and node.kind == "op" and node.region != "total"]
