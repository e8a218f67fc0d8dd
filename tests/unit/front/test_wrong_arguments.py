"""Something else where a problem, a store, a model or a path is expected: refused in words, whichever function is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import disthess
from disthess.errors import ConfigError

VECTOR = np.ones(2)

OF_A_PROBLEM: dict[str, Callable[[Any], object]] = {
    "plan": disthess.plan,
    "compute": lambda given: disthess.compute(given, "never.zarr"),
    "repair": lambda given: disthess.repair(given, "never.zarr"),
    "reference_hessian": disthess.reference_hessian,
    "operator": disthess.operator,
    "rank_bounds": disthess.rank_bounds,
    "node_curvature": disthess.node_curvature,
    "clarke_hessian": disthess.clarke_hessian,
    "compare": disthess.compare,
    "coupling_map": disthess.coupling_map,
    "summarise": lambda given: disthess.summarise(given, blocks={"all": slice(0, 1)}),
    "newton": disthess.newton,
    "stopping_report": disthess.stopping_report,
    "kronecker": lambda given: disthess.kronecker(given, "0"),
}
OF_A_STORE: dict[str, Callable[[Any], object]] = {
    "eigenvalues": disthess.eigenvalues,
    "spectral_density": disthess.spectral_density,
    "low_rank": lambda given: disthess.low_rank(given, 1),
    "low_rank_blocks": lambda given: disthess.low_rank_blocks(given, rank=1),
    "trace": disthess.trace,
    "psd_check": disthess.psd_check,
    "solve": lambda given: disthess.solve(given, VECTOR),
}
OF_A_PATH: dict[str, Callable[[Any], object]] = {
    "open_store": disthess.open_store,
    "open_cache": disthess.open_cache,
    "report": lambda given: disthess.report(given, "never.html"),
    "diff": lambda given: disthess.diff(given, given),
    "audit": disthess.audit,
    "plan_audit": disthess.plan_audit,
}
OF_A_MODEL: dict[str, Callable[[Any], object]] = {
    "Problem": lambda given: disthess.Problem(given, loss="mse", batches=[(torch.ones(1, 1), torch.ones(1, 1))]),
    "attention_sections": disthess.attention_sections,
    "expected_hessian": lambda given: disthess.expected_hessian(given, lambda *given: torch.ones(()), [VECTOR]),
}


def calls() -> list[Any]:
    objects = {**OF_A_PROBLEM, **OF_A_STORE, **OF_A_MODEL}
    found = [
        pytest.param(call, given, id=f"{name}-{given}") for name, call in objects.items() for given in (3, None, "x")
    ]
    return found + [
        pytest.param(call, given, id=f"{name}-{given}") for name, call in OF_A_PATH.items() for given in (3, None)
    ]


@pytest.mark.parametrize(("call", "given"), calls())
def test_what_is_given_is_named_and_so_is_what_is_expected(
    call: Callable[[Any], object], given: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"(expected|must be) .*, got {type(given).__name__}\b"):
        call(given)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_path_is_refused_before_anything_is_computed() -> None:
    problem = disthess.Problem(torch.nn.Linear(1, 1), loss="mse", batches=[(torch.ones(1, 1), torch.ones(1, 1))])
    for call in (disthess.compute, disthess.repair):
        with pytest.raises(ConfigError, match="expected the path or URL of a store, got int"):
            call(problem, 3)  # type: ignore[arg-type]
    for open_it in (disthess.open_store, disthess.open_cache):
        with pytest.raises(ConfigError, match=r"expected a disthess\.Problem, got int"):
            open_it("never.zarr", 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a store, got str"):
        disthess.stopping_report(problem, store="never.zarr")


def test_every_public_function_is_asked() -> None:
    known = {*OF_A_PROBLEM, *OF_A_STORE, *OF_A_PATH, *OF_A_MODEL}
    # They take no problem, store, model or path to one first.
    others = {"__version__", "Effort", "dask_cluster", "save_factors"}
    assert known | others == set(disthess.__all__)
