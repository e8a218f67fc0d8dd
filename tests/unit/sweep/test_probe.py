"""Products with given vectors by the sweep, against the dense oracle; microbatches of any size give the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import Case, cases

import disthess
from disthess.prepare import Options, prepare
from disthess.sweep.primal import compute_primals
from disthess.sweep.probe import probe_products

TYPICAL = ("mlp_two_batches_sum", "rnn", "tied_autoencoder", "batch_norm_train", "two_heads", "weight_decay")


@pytest.mark.parametrize("case", cases(TYPICAL, graph=True))
def test_probe_products_equal_the_oracles(case: Case) -> None:
    problem = case.make()
    prepared = prepare(problem, Options())
    parameters = {p.name: p.tensor.detach() for p in prepared.problem.parameters()}
    primals = compute_primals(prepared.problem, prepared.programs)
    vectors = torch.randn(3, problem.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for part in ("hessian", "ggn", "residual") if case.ggn else ("hessian",):
        wanted = vectors.numpy() @ disthess.reference_hessian(problem, part)
        for samples in (1, 2, 256):
            found = probe_products(primals, parameters, vectors, part=part, samples=samples).numpy()
            scale = max(float(np.linalg.norm(wanted)), 1e-14)
            assert np.linalg.norm(found - wanted) <= 1e-11 * scale, (part, samples)
