"""Audits of a small network while it is trained, every number of them from its dense Hessian."""

from __future__ import annotations

import dataclasses
import itertools
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import torch

from disthess.audits.record import Alert, AuditRecord, Estimate
from disthess.hvp import gradient
from disthess.problem import Problem
from disthess.reference import reference_hessian
from disthess.reports.independence import coupling_of

BLOCKS = ("encoder.layer.0.weight", "encoder.layer.0.bias", "encoder.layer.2.weight", "encoder.layer.2.bias")


def trained_problem(steps: int) -> Problem:
    """A network of 67 parameters after so many steps of gradient descent."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    model = torch.nn.ModuleDict({"layer": layers}).double()
    inputs, targets = torch.randn(24, 5, dtype=torch.float64), torch.randint(0, 3, (24,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(layers(inputs), targets).backward()
        optimiser.step()
    return Problem(layers, loss="cross_entropy", batches=[(inputs, targets)])


def audits(count: int, every: int = 20) -> list[AuditRecord]:
    """One audit each ``every`` steps; the trace has an interval, and the rule for the largest eigenvalue is broken sometimes."""
    return [audit_of(trained_problem(every * at), every * at) for at in range(count)]


def many_audits(count: int, blocks: int = 4) -> list[AuditRecord]:
    """Audits that differ by noise from a few real ones; the last has that many blocks."""
    few = audits(4, every=60)
    noise = np.random.default_rng(0).lognormal(0.0, 0.1, count)
    made = []
    for at, factor in enumerate(noise.tolist()):
        record = few[min(3, 4 * at // count)]
        estimates = tuple(
            dataclasses.replace(e, value=e.value * factor, low=e.low * factor, high=e.high * factor)
            for e in record.estimates
        )
        step = 250 * at
        made.append(
            dataclasses.replace(
                record, key=f"{step:x}", step=step, checkpoint=f"checkpoint-{step:06d}.safetensors", estimates=estimates
            )
        )
    names = tuple(f"encoder.layers.{at // 4}.self_attn.{'qkvo'[at % 4]}_proj.weight" for at in range(blocks))
    distance = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks)))
    coupling = np.exp(-distance / 3.0)
    arrays = {"coupling/value": coupling, "coupling/low": coupling, "coupling/high": coupling, "norm/value": coupling}
    own = tuple(_exact(metric, name, 1.0 + at) for at, name in enumerate(names) for metric in ("lambda_max", "trace"))
    whole = tuple(entry for entry in made[-1].estimates if entry.block == "")
    arrays = {**made[-1].arrays, **arrays}
    made[-1] = dataclasses.replace(made[-1], blocks=names, arrays=arrays, estimates=(*whole, *own))
    return made


def audit_of(problem: Problem, step: int) -> AuditRecord:
    hessian = np.asarray(reference_hessian(problem))
    loss, slope = gradient(problem, tuple(p.name for p in problem.parameters()))
    values = np.linalg.eigvalsh(hessian)
    ends = np.cumsum([0, *(p.tensor.numel() for p in problem.parameters())])
    spans = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    norms = np.array([[np.linalg.norm(hessian[a, b]) for b in spans] for a in spans])
    coupling = coupling_of(norms)
    grid = np.linspace(values[0] - 0.05, values[-1] + 0.05, 120)
    width = 0.02 * (values[-1] - values[0])
    lines = np.exp(-((grid[:, None] - values) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))
    found = {
        "loss": loss,
        "gradient_norm": float(slope.norm()),
        "lambda_max": values[-1],
        "lambda_min": values[0],
        "rate_limit": 2 / values[-1],
        "trace": values.sum(),
        "frobenius": np.linalg.norm(values),
        "negative_mass": float(np.mean(values < -1e-12)),
        "kinks": 0.0,
        "stop": 0.0,
    }
    estimates = [_exact(name, "", float(value)) for name, value in found.items()]
    trace = float(values.sum())
    estimates = [e for e in estimates if e.metric != "trace"]
    estimates.append(Estimate("trace", "", trace * 1.01, trace * 0.97, trace * 1.05, 0.95, "Hutch++ with 48 products."))
    for name, span in zip(BLOCKS, spans, strict=True):
        own = np.linalg.eigvalsh(hessian[span, span])
        estimates.append(_exact("lambda_max", name, float(own[-1])))
        estimates.append(_exact("trace", name, float(own.sum())))
    alerts = ()
    if values[-1] > 1.2:
        alerts = (
            Alert(
                "sharpness", "lambda_max", "", float(values[-1]), 1.2, f"lambda_max is {values[-1]:.3g}, allowed 1.2."
            ),
        )
    return AuditRecord(
        key=f"{step:016x}",
        checkpoint=f"step_{step}.pt",
        step=step,
        taken=(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=step / 10)).isoformat(),
        seconds=1.5,
        products=67,
        facts={"seed": "0", "data": "ab12cd34", "torch": "2.13", "attention": "math"},
        estimates=tuple(estimates),
        blocks=BLOCKS,
        arrays={
            "density/grid": grid,
            "density/value": lines.mean(axis=1),
            "density/error": 0.1 * lines.mean(axis=1),
            "coupling/value": coupling,
            "coupling/low": 0.9 * coupling,
            "coupling/high": 1.1 * coupling,
            "norm/value": norms,
            "tile/encoder.layer.2.weight": hessian[spans[2], spans[2]],
        },
        alerts=alerts,
    )


def _exact(metric: str, block: str, value: float) -> Estimate:
    return Estimate(metric, block, value, value, value, 1.0, "From the dense Hessian in float64.")
