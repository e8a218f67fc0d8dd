"""A sweep made smaller for want of memory: the same numbers to rounding, at every halving down to one tangent and one sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import disthess
from disthess.api import run_prepared
from disthess.execute import tile_job
from disthess.execute.tile_job import TileWorker
from disthess.prepare import Options, prepare
from disthess.store.layout import Tile, TileRecord
from disthess.store.store import Store


def problem() -> disthess.Problem:
    torch.manual_seed(0)
    shared = torch.nn.Linear(6, 6)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), shared, torch.nn.GELU(), shared)
    return disthess.Problem(model, loss="mse", batches=[(torch.randn(23, 5), torch.randn(23, 6))])


def options(method: str) -> Options:
    return Options(parts=("hessian", "ggn"), method=method, dtype="float64", threads=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["graph", "autograd"])
def test_every_halving_gives_the_same_numbers(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(problem(), options(method))
    whole = run_prepared(prepared, options(method), tmp_path / "whole.zarr", certify=False)
    np.testing.assert_allclose(whole.dense(), disthess.reference_hessian(problem()), rtol=1e-10, atol=1e-13)
    most = max(source.halvings for source in prepared.plan.sources)
    assert most >= (5 if method == "graph" else 2)
    compute = TileWorker.compute
    for split in range(1, most + 1):
        monkeypatch.setattr(
            tile_job.TileWorker, "compute", lambda worker, tile, _=0, split=split: compute(worker, tile, split)
        )
        halved = run_prepared(
            prepare(problem(), options(method)), options(method), tmp_path / f"{split}.zarr", certify=False
        )
        for part in ("hessian", "ggn"):
            np.testing.assert_allclose(halved.dense(part), whole.dense(part), rtol=1e-12, atol=1e-14)
        assert {record.split for record in halved.store.records()} == {split}
    assert {record.split for record in whole.store.records()} == {0}


def test_tiles_too_large_are_split_and_the_store_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiles of one source raise MemoryError until their stack is one tangent."""
    prepared = prepare(problem(), options("graph"))
    limited, stack = next((s.source, s.stack) for s in prepared.plan.sources if s.stack > 2)
    needed = (stack - 1).bit_length()
    compute = TileWorker.compute

    def scarce(worker: TileWorker, tile: Tile, split: int = 0) -> TileRecord:
        if tile.source == limited and split < needed:
            raise MemoryError
        return compute(worker, tile, split)

    monkeypatch.setattr(tile_job.TileWorker, "compute", scarce)
    store = run_prepared(prepared, options("graph"), tmp_path / "a.zarr")
    tiles = [tile.index for tile in store.layout.tiles if tile.source == limited]
    assert {r.tile: r.split for r in Store.open(tmp_path / "a.zarr").records() if r.split} == dict.fromkeys(
        tiles, needed
    )

    from disthess.cli.tables import print_splits

    print_splits(store)
    assert f"{len(tiles)} tile" in capsys.readouterr().out
    monkeypatch.setattr(tile_job.TileWorker, "compute", compute)
    opened = Store.open(tmp_path / "a.zarr", writable=True)
    opened.mark_missing(tiles)
    run_prepared(prepare(problem(), options("graph")), options("graph"), tmp_path / "a.zarr")
    assert not any(record.split for record in opened.records()), (
        "computed whole again, a tile is no longer called split"
    )
