"""Counted sweeps against formulas worked out by hand, and counted rules against torch's counter."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from disthess.graph.program import build_programs
from disthess.planning.work import Work
from disthess.prepare import Options, prepare
from disthess.problem import Problem
from disthess.sweep.meter import RuleMeter

SAMPLES = 7


def chain(*widths: int) -> Problem:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    x, y = torch.randn(SAMPLES, widths[0]).double(), torch.randn(SAMPLES, widths[-1]).double()
    return Problem(nn.Sequential(*layers[:-1]).double(), loss="mse", batches=[(x, y)])


def test_the_output_basis_of_a_chain_costs_what_the_formula_says() -> None:
    """Per sample: ``sum_v o_v (2 sum_(l>v) o_l i_l + i_v (sum_(w>v) p_w + o_(v+1))) + o_v^2 i_v (i_v + 1) / 2``."""
    widths = (4, 6, 3, 5)
    layers = list(zip(widths[1:], widths, strict=False))
    plan = prepare(chain(*widths), Options(parameters="*.weight", basis="output")).plan
    wanted = 0
    for place, (o, i) in enumerate(layers):
        later = sum(out * width for out, width in layers[place + 1 :])
        # The next layer reads the units themselves: what moves its input is one vector a unit.
        own = layers[place + 1][0] if place + 1 < len(layers) else 0
        wanted += o * (2 * later + i * (later + own)) + o * o * i * (i + 1) // 2
    assert plan.product_flops == 2 * SAMPLES * wanted


def test_the_parameter_basis_of_a_chain_costs_what_the_formula_says() -> None:
    """Per sample and row of layer v: nothing forward, ``2 p_l`` through each later layer, and its rows: D^T f'' and S x'."""
    widths = (4, 6, 3, 5)
    sizes = [before * after for before, after in pairwise(widths)]
    plan = prepare(chain(*widths), Options(parameters="*.weight", basis="parameter")).plan
    wanted = 0
    for place, own in enumerate(sizes):
        later = sum(sizes[place + 1 :])
        # A unit vector of the source takes no product, and of its own rows there is D^T f'' alone: its input does not move.
        wanted += own * (later + later + own + 2 * later)
    assert plan.product_flops == 2 * SAMPLES * wanted


def test_a_rule_is_measured_in_tangents_and_samples() -> None:
    problem = chain(4, 6, 3)
    graph = build_programs(problem, frozenset(p.name for p in problem.parameters()))[0].graph
    meter = RuleMeter(graph)
    linear = next(node.index for node in graph.nodes if node.op == "aten.linear.default")
    tanh = next(node.index for node in graph.nodes if node.op == "aten.tanh.default")
    assert meter.tangent(linear, (0,)) == Work(per_pair=24)
    assert meter.tangent(linear, (0, 1)) == Work(per_pair=48)
    assert meter.cotangent(linear, True, (0,), (0, 1)) == (Work(per_pair=24 * 3), (0, 1))
    assert meter.cotangent(linear, False, (0,), (0,)) == (Work(), ())
    assert meter.per_sample(linear, True, (), 1) == (Work(), 0)
    assert meter.cotangent(tanh, False, (0,), (0,)) == (Work(), (0,))


def test_a_rule_without_per_sample_rows_starts_anew_for_every_sample() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding="same"), nn.Flatten())
    net, data = net.double(), (torch.randn(5, 4).double(), torch.randn(5, 12).double())
    problem = Problem(net, loss="mse", batches=[data])
    graph = build_programs(problem, frozenset(p.name for p in problem.parameters()))[0].graph
    conv = next(node.index for node in graph.nodes if node.op.startswith("aten.conv2d"))
    # Padded on one side, so by autograd: once the convolution itself, then for each tangent the gradient of its weight, 48
    # multiply-adds each.
    assert RuleMeter(graph).per_sample(conv, True, (), 1) == (Work(per_sample=48, per_pair=48), 48)
