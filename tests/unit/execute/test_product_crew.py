"""Products on Ray: the same bits whoever computes them, actors that die, and memory as planned. One Ray for the module."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import disthess
from disthess.errors import ExecutionError, ProblemError
from disthess.execute.product_job import is_large
from disthess.planning.memory import LIBRARY_BYTES, WORKSPACE_BYTES

ray = pytest.importorskip("ray")
_HERE = Path(__file__).parent


def _load(name: str) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


Mortal = _load("mortal_objective").Mortal


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = before or "disabled"
    path = os.pathsep.join([str(_HERE), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()
    if before is None:
        del os.environ["RAY_AUTH_MODE"]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def mlp(folder: Path | None = None) -> disthess.Problem:
    """Five batches of 4 to 8 samples, 83 parameters, float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [torch.randn(4 + i, 6) for i in range(5)]
    objective = Mortal(folder or Path("nowhere"))
    return disthess.Problem(net, objective=objective, batches=batches, weight_decay=0.1)


def serial(problem: disthess.Problem, block: np.ndarray) -> np.ndarray:
    with disthess.operator(problem, executor="serial", threads=1) as operator:
        return operator.matmat(block)


BLOCK = np.random.default_rng(0).standard_normal((83, 11))


@pytest.mark.slow
def test_products_have_the_same_bits_on_any_number_of_workers(cluster: None) -> None:
    problem = mlp()
    wanted = serial(problem, BLOCK)
    np.testing.assert_allclose(wanted, disthess.reference_hessian(problem) @ BLOCK, atol=1e-5)
    for workers in (1, 3):
        with disthess.operator(problem, workers=workers, threads=1) as operator:
            assert operator.plan.workers == workers
            assert operator.matmat(BLOCK).tobytes() == wanted.tobytes(), workers
            peaks = operator.peak_bytes()
            assert len(peaks) == workers
            assert all(0 < peak <= operator.plan.worker_bytes for peak in peaks)


@pytest.mark.slow
def test_an_actor_that_died_is_replaced_and_its_tapes_made_again(cluster: None) -> None:
    problem = mlp()
    wanted = serial(problem, BLOCK)
    np.testing.assert_allclose(wanted, disthess.reference_hessian(problem) @ BLOCK, atol=1e-5)
    with disthess.operator(problem, workers=2, threads=1) as operator:
        assert operator.matmat(BLOCK).tobytes() == wanted.tobytes()
        ray.kill(crew_of(operator).actor(1))
        assert operator.matmat(BLOCK).tobytes() == wanted.tobytes()
        assert crew_of(operator).replaced == 1


@pytest.mark.slow
def test_an_actor_that_dies_at_its_work_is_replaced(tmp_path: Path, cluster: None) -> None:
    problem = mlp(tmp_path)
    wanted = serial(problem, BLOCK)
    (tmp_path / "once").write_text("6")
    with disthess.operator(problem, workers=2, threads=1) as operator:
        assert operator.matmat(BLOCK).tobytes() == wanted.tobytes()
        assert not (tmp_path / "once").exists()
        assert crew_of(operator).replaced == 1


@pytest.mark.slow
def test_pieces_go_to_the_living_where_no_fresh_actor_can_be_had(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disthess.execute.product_crew import ProductCrew

    problem = mlp()
    wanted = serial(problem, BLOCK)
    with disthess.operator(problem, workers=2, threads=1) as operator:
        crew = crew_of(operator)
        monkeypatch.setattr("disthess.execute.product_crew.START_SECONDS", 0.01)
        ray.kill(crew.actor(0))
        assert operator.matmat(BLOCK).tobytes() == wanted.tobytes()
        assert isinstance(crew, ProductCrew)
        assert len(crew._actors) == 1
        ray.kill(crew.actor(1))
        with pytest.raises(ExecutionError, match="No worker is left"):
            operator.matmat(BLOCK)


@pytest.mark.slow
def test_a_batch_that_always_kills_its_worker_is_named(tmp_path: Path, cluster: None) -> None:
    with disthess.operator(mlp(tmp_path), workers=2, threads=1) as operator:
        (tmp_path / "always").write_text("5")
        with pytest.raises(ExecutionError, match=r"The product of batch 1 failed: its worker died 4 times; .*died"):
            operator.matmat(BLOCK)


@pytest.mark.slow
def test_an_error_in_an_actor_is_the_same_error_here(cluster: None) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    problem = disthess.Problem(model, objective=_log, batches=[torch.ones(3, 1), -torch.ones(2, 1)])
    with (
        disthess.operator(problem, workers=2, threads=1) as operator,
        pytest.raises(ProblemError, match="the objective is nan on batch 1"),
    ):
        operator.matmat(np.ones((1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(("held", "width"), [(1, 256), (3, 256), (1, 640), (3, 640)])
def test_measured_memory_is_within_the_plan(cluster: None, held: int, width: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
    batches = [(torch.randn(6000, 32), torch.randint(0, 4, (6000,))) for _ in range(3)]
    problem = disthess.Problem(net, loss="cross_entropy", batches=batches)
    with disthess.operator(problem, executor="serial", threads=1) as bare:
        allowed = bare.plan.fixed_bytes + held * bare.plan.tape.held
    with disthess.operator(problem, workers=1, threads=1, memory_bytes=allowed) as operator:
        operator.matmat(np.random.default_rng(0).standard_normal((operator.size, 8)))
        plan, peak = operator.plan, operator.peak_bytes()[0]
    assert plan.held == held
    assert is_large(plan.size) == (width > 256), "vectors together, and one after the other"
    assert held * plan.tape.held < peak <= plan.worker_bytes <= allowed, (peak, plan)
    beyond = plan.worker_bytes - LIBRARY_BYTES - WORKSPACE_BYTES
    assert beyond <= 4 * peak, f"the bound is too loose to be of use: {peak}, {plan}"


@pytest.mark.slow
def test_a_private_ray_ends_with_the_operator() -> None:
    code = (
        "import ray, numpy as np, torch, disthess\n"
        "model = torch.nn.Linear(2, 1)\n"
        "data = [(torch.eye(2), torch.zeros(2, 1)), (torch.ones(2, 2), torch.zeros(2, 1))]\n"
        "with disthess.operator(disthess.Problem(model, loss='mse', batches=data), workers=2, threads=1) as found:\n"
        "    print('inside')\n"
        "    assert found.matmat(np.eye(3))[0].tolist() == [1.5, 1.0, 1.5]\n"
        "assert not ray.is_initialized()\n"
        "left = disthess.operator(disthess.Problem(model, loss='mse', batches=data), workers=1, threads=1)\n"
        "ray.shutdown()\n"
        "try:\n"
        "    left.matmat(np.eye(3))\n"
        "except disthess.errors.ExecutionError as error:\n"
        "    print(error)\n"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("inside\nthe Ray that this operator started its workers on was shut down")


def _log(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).log().sum()


def crew_of(operator: Any) -> Any:
    """The driver's side, which a user has no need of."""
    return operator._open().total.__self__
