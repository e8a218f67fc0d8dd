"""Differences of coupling maps and exact blocks: false ones as rarely as stated, real ones found, what cannot be judged said."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

import disthess
from disthess.audits.history import History
from disthess.audits.record import AuditRecord, MapFacts
from disthess.cli.main import app
from disthess.linalg.block_map import estimate_block_map
from disthess.linalg.operator import DenseOperator

SIZE, COUNT = 30, 6
PLACES = [slice(at, at + SIZE) for at in range(0, SIZE * COUNT, SIZE)]
NAMES = tuple(f"b{at}" for at in range(COUNT))


def matrix(strength: float = 1.0) -> np.ndarray:
    """Blocks with spectra that fall off, coupled the less the farther they are; the first pair so many times as strongly."""
    random = np.random.default_rng(0)
    size = SIZE * COUNT
    found = np.zeros((size, size))
    for i, a in enumerate(PLACES):
        for j, b in enumerate(PLACES[i:], i):
            rows, columns = (np.linalg.qr(random.standard_normal((SIZE, SIZE)))[0] for _ in range(2))
            values = np.arange(1, SIZE + 1) ** -0.7
            block = rows * values @ (rows.T if i == j else 0.5 ** (j - i) * columns.T)
            found[a, b] = strength * block if (i, j) == (0, 1) else block
            found[b, a] = found[a, b].T
    return found


def record(key: str, whole: np.ndarray, seed: int, probes: int = 12, **fields: Any) -> AuditRecord:
    found = estimate_block_map(DenseOperator(whole), PLACES, probes=probes, seed=seed, confidence=0.9)
    arrays = {
        f"{name}/{end}": getattr(interval, end)
        for name, interval in (("coupling", found.coupling), ("norm", found.norm), ("trace", found.trace))
        for end in ("value", "low", "high")
    }
    given: dict[str, Any] = {
        "facts": {"dtype": "float64"},
        "blocks": NAMES,
        "arrays": {**arrays, **fields.pop("more", {})},
        "map_facts": MapFacts(0.9, probes, seed, found.products),
    }
    return AuditRecord(key, f"{key}.pt", 1, "2026-01-02T03:04:05+00:00", 1.0, 9, estimates=(), **{**given, **fields})


@pytest.mark.parametrize("probes", [5, 12])
def test_no_pair_is_said_to_have_changed_more_often_than_stated(probes: int) -> None:
    """15 pairs of one matrix by other vectors, 60 comparisons at 5 %: some three tables may assert a change, by Holm's rule."""
    whole, wrong = matrix(), {"pairs": 0, "traces": 0}
    sides = [record("a", whole, seed, probes) for seed in range(120)]
    small = []
    for a, b in zip(sides[::2], sides[1::2], strict=True):
        found = disthess.diff(a, b, significance=0.05)
        assert len(found.pairs) == 15
        wrong["pairs"] += any(row.verdict != "chance" for row in found.pairs)
        wrong["traces"] += any(row.verdict != "chance" for row in found.rows if row.metric == "map_trace")
        small += [row.p < 0.05 for row in found.pairs]
    most = stats.binom.ppf(0.999, 60, 0.05)
    assert wrong["pairs"] <= most
    assert wrong["traces"] <= most
    # Nor are single chances idle: about as many are small as should be.
    assert 0.01 <= np.mean(small) <= 0.07


def test_a_pair_that_changed_is_found_and_its_ratio_lies_in_its_interval() -> None:
    held, false = 0, 0
    for seed in range(40):
        found = disthess.diff(record("a", matrix(), seed), record("b", matrix(3.0), 1000 + seed))
        row = found.pair("b1", "b0")
        assert row is not None
        assert row.verdict == "rose"
        assert row.p < 0.01 / 15
        held += row.low <= 3.0 <= row.high
        false += any(one.verdict != "chance" for one in found.pairs if one is not row)
    assert false <= stats.binom.ppf(0.999, 40, 0.01)
    assert held >= stats.binom.ppf(0.001, 40, 0.95)


def test_exact_couplings_are_compared_to_rounding_and_zero_is_known() -> None:
    whole, other = matrix(), matrix()
    other[PLACES[0], PLACES[1]] *= 1 + 1e-9
    other[PLACES[1], PLACES[0]] *= 1 + 1e-9
    other[PLACES[4], PLACES[5]] = other[PLACES[5], PLACES[4]] = 0.0
    found = disthess.diff(record("a", whole, 0, SIZE), record("b", other, 1, SIZE))
    verdicts = {(row.first, row.second): row.verdict for row in found.pairs}
    assert verdicts.pop(("b0", "b1")) == "rose"
    assert verdicts.pop(("b4", "b5")) == "fell"
    assert set(verdicts.values()) == {"equal"}
    # An estimate of no coupling at all is certain too; and so is that of a block that is none.
    estimated = disthess.diff(record("a", whole, 0), record("b", other, 1))
    row = estimated.pair("b4", "b5")
    assert row is not None
    assert (row.verdict, row.ratio, row.p) == ("fell", 0.0, 0.0)
    other[PLACES[3], PLACES[3]] = 0.0
    undefined = disthess.diff(record("a", whole, 0), record("b", other, 1)).pair("b3", "b2")
    assert undefined is not None
    assert undefined.verdict == "undefined"


def test_blocks_are_matched_by_their_names() -> None:
    order = [3, 1, 0, 2, 5, 4]
    a, b = record("a", matrix(), 0), record("b", matrix(3.0), 1)
    turned = {
        name: array[np.ix_(order, order)] if array.ndim == 2 else array[order] for name, array in b.arrays.items()
    }
    same = disthess.diff(a, dataclasses.replace(b, blocks=tuple(NAMES[at] for at in order), arrays=turned))
    assert same.pairs == disthess.diff(a, b).pairs
    fewer = disthess.diff(a, dataclasses.replace(b, blocks=("b0", "b1", "x", "b3", "b4", "b5")))
    assert len(fewer.pairs) == 10
    assert "couplings: in the map of A alone, b2" in fewer.notes
    assert "couplings: in the map of B alone, x" in fewer.notes


def test_an_audit_that_does_not_say_what_its_intervals_are_worth_is_not_judged() -> None:
    old = record("a", matrix(), 0, map_facts=None)
    found = disthess.diff(old, record("b", matrix(3.0), 1))
    assert {row.verdict for row in found.pairs} == {"not judged"}
    assert all(math.isnan(row.p) for row in found.pairs)
    assert sum("did not keep what its intervals are worth" in note for note in found.notes) == 1
    assert [row.verdict for row in found.rows] == ["only B"] * COUNT
    without = disthess.diff(old, record("b", matrix(), 1, blocks=(), arrays={}, map_facts=None))
    assert without.pairs == ()
    assert "couplings: in the map of A alone, all of it" in without.notes


def test_exact_blocks_differ_beyond_rounding() -> None:
    tile = np.random.default_rng(1).standard_normal((4, 7))
    near, far = tile * (1 + 1e-14), tile + 0.01
    first = {
        "tile/same": tile,
        "tile/moved": tile,
        "tile/cut": tile,
        "tile/gone": tile,
        "tile/bad": tile,
        "tile/0": 0 * tile,
    }
    second = {"tile/same": near, "tile/moved": far, "tile/cut": tile[:2], "tile/new": tile, "tile/bad": tile * np.nan}
    sides = [
        record(key, matrix(), 0, arrays=arrays) for key, arrays in (("a", first), ("b", {**second, "tile/0": tile}))
    ]
    found = disthess.diff(*sides)
    verdicts = {row.name: row.verdict for row in found.tiles}
    assert verdicts == {
        "same": "equal",
        "moved": "differs",
        "cut": "other shape",
        "gone": "only A",
        "bad": "undefined",
        "0": "differs",
        "new": "only B",
    }
    moved = found.tile("moved")
    assert moved is not None
    assert moved.relative == pytest.approx(0.01 * math.sqrt(28) / np.linalg.norm(tile))
    assert (moved.rows, moved.columns) == (4, 7)
    zero = found.tile("0")
    assert zero is not None
    assert math.isinf(zero.relative)
    # What float64 tells apart, float32 does not.
    coarse = [dataclasses.replace(side, facts={"dtype": "float32"}) for side in sides]
    shifted = dataclasses.replace(coarse[1], arrays={**second, "tile/same": tile * (1 + 1e-7)})
    plain = disthess.diff(coarse[0], shifted).tile("same")
    assert plain is not None
    assert plain.verdict == "equal"


def test_the_verb_prints_couplings_and_exact_blocks(tmp_path: Path) -> None:
    history = History.open_or_create(tmp_path / "h.zarr")
    tile = np.arange(6.0).reshape(2, 3)
    history.append(record("aaaaaa", matrix(), 0, more={"tile/corner": tile}))
    history.append(record("bbbbbb", matrix(3.0), 1, more={"tile/corner": 2 * tile}))
    words = ["diff", f"{tmp_path}/h.zarr@-2", f"{tmp_path}/h.zarr@-1"]
    said = CliRunner().invoke(app, [*words, "--csv", str(tmp_path / "d.csv")])
    assert said.exit_code == 0, said.output
    assert "1 of 15 couplings changed by more than chance and rounding (at most 0.01" in " ".join(said.stdout.split())
    assert "2 x 3" in said.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "d.csv").read_text())))
    pair = next(row for row in rows if row["metric"] == "log_coupling" and row["block"] == "b0 x b1")
    assert float(pair["low"]) < math.log(3) < float(pair["high"])
    assert float(pair["difference"]) == pytest.approx(float(pair["b"]) - float(pair["a"]))
    assert pair["verdict"] == "rose"
    assert [row["verdict"] for row in rows if row["metric"] == "tile"] == ["differs"]
    value = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert value["pairs"][0]["first"] == "b0"
    assert value["tiles"][0]["relative"] == 1.0
