"""The benchmark suite runs, and what it keeps is complete."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_unflatten
from torch.utils.flop_counter import flop_registry

import disthess
from disthess.store.layout import Tile
from disthess.types import Span

pytest.importorskip("sklearn")
BENCH = Path(__file__).parents[1] / "bench"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, env=environment, timeout=240
    )


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Modules of the suite, which see each other by their own names."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return importlib.import_module


@pytest.mark.slow
def test_the_hessian_verb_keeps_everything_that_it_measured(tmp_path: Path) -> None:
    done = bench("hessian", "--problem", "cnn", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "hessian_cnn_float32.json").read_text())
    assert found["ratio"] > 0
    assert {"processor", "cores", "threads", "memory_bytes"} <= set(found["hardware"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["problem"] == {"name": "cnn", "scale": 0.5, "P": 666, "N": 64, "dtype": "float32"}
    assert found["columns"] == {"timed": 32, "of": 666, "peers_scaled_up": True}
    tools = {"torch.func", *(["curvlinops"] if importlib.util.find_spec("curvlinops") else [])}
    assert set(found["best_of_tools"]) == tools
    assert ("curvlinops is left out" in done.stdout) == ("curvlinops" not in tools)
    ours = {"disthess, 2 threads", "disthess, threads 2 x 1 thread"}
    ours |= {"disthess, processes 2 x 1 thread"} if sys.platform == "linux" else set()
    assert set(found["seconds"]) == ours | {f"{tool}, chunk 16" for tool in tools}
    assert all(value > 0 for value in found["medians"].values())
    assert set(found["differences"]) >= {f"{tool}, chunk 16" for tool in tools}
    assert found["wrong_peers"] == []
    sweep = found["sweeps"][found["best_disthess"]]
    assert sweep["product_flops"] > 0
    assert 0 < sweep["fraction_of_peak"] < 1.5
    stages = sweep["stages"]
    parts = sum(stages[key] for key in ("prepare", "start", "tiles", "finish"))
    assert parts == pytest.approx(stages["seconds"], rel=1e-6)
    assert 0 < stages["busy"] <= stages["tiles"] * 2.001
    assert all(rate > 0 for rate in found["writes"]["bytes_per_second"]["while_computing"].values())
    table = bench("table", "--out", str(tmp_path))
    assert table.returncode == 0, table.stderr
    assert re.search(
        r"^\| cnn, float32 \| 666 \| 64 \| .* s \(((threads|processes) 2 x 1 thread|2 threads)\)",
        table.stdout,
        re.MULTILINE,
    )


@pytest.mark.parametrize("name", [pytest.param("mlp", marks=pytest.mark.slow), "cnn", "rnn"])
def test_floors_are_of_all_products_that_the_plan_counts(module: Callable[[str], ModuleType], name: str) -> None:
    bounds, runs = module("bounds"), module("runs")
    problem = module("variants").build(name, 0.25, 16)
    with bounds.counted() as tally:
        runs.compute(problem, runs.Crew("serial", 1, 1), "float64")
    counted = 0
    for key, count in tally.counts.items():
        function, (forms, spec) = tally.calls[key]
        count_flops = flop_registry.get(function.overloadpacket)
        if count_flops is not None:
            assert function.overloadpacket.__name__ in bounds.PRODUCTS
            args, kwargs = tree_unflatten([bounds.made(form, tally.whole) for form in forms], spec)
            counted += count * count_flops(*args, **kwargs, out_val=function(*args, **kwargs))
    assert counted == disthess.plan(problem, dtype="float64", threads=1).product_flops
    seconds = bounds.alone_seconds(tally)
    assert {"mm", "mul"} <= set(seconds)
    assert all(value > 0 for value in seconds.values())


@pytest.mark.slow
def test_the_bounds_verb_orders_its_floors(tmp_path: Path) -> None:
    done = bench("bounds", "--problem", "mlp", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bounds_mlp_float32.json").read_text())
    work, faster = found["seconds_alone_of"], found["times_faster"]
    assert 0 < work["products"] < work["operations"]
    assert faster["operations"] < faster["products"]
    assert found["target"] == 10
    assert "Floors" in done.stdout


@pytest.mark.parametrize("name", ["peers", "table", "growth"])
def test_examples_in_docstrings_are_right(module: Callable[[str], ModuleType], name: str) -> None:
    failed, tried = doctest.testmod(module(name))
    assert tried > 0
    assert failed == 0


def test_autograd_decides_who_is_wrong(module: Callable[[str], ModuleType]) -> None:
    problem = module("variants").build("mlp", 1 / 16, 8).to(torch.float64)
    hessian = torch.as_tensor(np.asarray(disthess.reference_hessian(problem)))
    columns = module("peers").spread_columns(len(hessian), 7)
    right = hessian[columns]
    wrong = right.clone()
    wrong[3, 5] += 1e-8 * right.abs().max()

    agreement = module("agreement").Agreement(problem, columns, "float64")
    agreement.note_run("disthess", right.numpy())
    agreement.note_peer("right", right)
    agreement.note_peer("wrong", wrong)
    assert agreement.wrong == ["wrong"]
    assert agreement.differences["wrong"] == pytest.approx(1e-8, rel=1e-3)
    with pytest.raises(SystemExit, match="another differs"):
        agreement.note_run("another", wrong.numpy())

    agreement = module("agreement").Agreement(problem, columns, "float64")
    agreement.note_run("disthess", wrong.numpy())
    with pytest.raises(SystemExit, match="no time of disthess counts"):
        agreement.note_peer("right", right)


@pytest.mark.parametrize(
    ("owners", "flops", "expected"),
    [
        pytest.param((0, 1, 1, 1), (3, 1, 1, 1), 3, id="balanced"),
        pytest.param((0, 0, 0, 0), (1, 1, 1, 1), 2, id="the idle one takes tiles of the other"),
        pytest.param((0, 1), (5, 1), 5, id="no tile is cut"),
    ],
)
def test_a_schedule_ends_when_its_last_tile_does(
    module: Callable[[str], ModuleType], owners: tuple[int, ...], flops: tuple[int, ...], expected: int
) -> None:
    tiles = [
        Tile(index, "w", Span(index, index + 1), 0, owner, work, 0, 0)
        for index, (owner, work) in enumerate(zip(owners, flops, strict=True))
    ]
    assert module("scaling").makespan(SimpleNamespace(layout=SimpleNamespace(tiles=tiles)), 2) == expected
