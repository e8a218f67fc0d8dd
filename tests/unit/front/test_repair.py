"""Any file of a real store changed, cut or removed: verify says so, and repair gives the undisturbed store's bytes back."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import disthess
from disthess import api
from disthess.cli.main import app
from disthess.errors import DisthessError, StoreError
from disthess.mend import repair, verify
from disthess.problem import Problem
from disthess.store.store import Store
from disthess.store.verify import VerifyReport

OPTIONS = {"threads": 1, "parts": ("hessian", "ggn"), "shared": "uses", "activations": ["1"], "dtype": "float64"}


def problem(seed: int = 3) -> Problem:
    """A weight used twice, so that panels of uses and their sums are there; and several tiles."""
    torch.manual_seed(seed)
    shared = torch.nn.Linear(5, 5)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), shared, torch.nn.Tanh(), shared, torch.nn.Linear(5, 3)
    )
    return Problem(model, loss="cross_entropy", batches=[(torch.randn(9, 4), torch.randint(0, 3, (9,)))])


def array_bytes(path: Path) -> dict[str, bytes]:
    kinds = ("panels", "uses", "activations", "gradient", "loss")
    files = [file for kind in kinds for file in sorted((path / kind).rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run.zarr"
    store = disthess.compute(problem(), path, progress=False, **OPTIONS)
    disthess.low_rank(store, rank=2)
    assert len(store.layout.tiles) > 5
    assert verify(path).ok
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy.zarr"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the tiles that workers are given."""
    seen: list[int] = []
    write = Store.write_tile

    def count(self: Store, tile: object, arrays: object) -> tuple[int, int]:
        seen.append(tile.index)  # type: ignore[attr-defined]
        return write(self, tile, arrays)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "write_tile", count)
    return seen


def flip(file: Path, generator: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    file.write_bytes(raw)


def cut(file: Path, generator: random.Random) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: generator.randrange(len(raw))])


def remove(file: Path, generator: random.Random) -> None:
    file.unlink()


USED = ("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")


def is_irrelevant(before: bytes, file: Path) -> bool:
    """Whether a change cannot matter: a zarr.json whose fields that are read, and whose sealed attributes, say what they said.

    White space is one such place; the others are names of fields that mean the same where they are absent.
    """
    if file.name != "zarr.json" or not file.exists():
        return False
    try:
        old, new = json.loads(before), json.loads(file.read_bytes())
    except ValueError:
        return False
    if old["node_type"] == "group" and old["attributes"] != (new.get("attributes") or {}):
        return False
    defaults = {"name": "default", "configuration": {"separator": "/"}}
    return all(
        _plain(old.get(key, defaults if key == "chunk_key_encoding" else None))
        == _plain(new.get(key, defaults if key == "chunk_key_encoding" else None))
        for key in USED
    )


def _plain(value: object) -> object:
    """Without configurations that are those of default."""
    if isinstance(value, dict) and value.get("name") == "default":
        return "default"
    return value


def found_by_verify(path: Path) -> VerifyReport | None:
    """The report; None where the store cannot even be opened, which is one too."""
    try:
        return verify(path)
    except StoreError:
        return None


def disturb(made: Path, place: Path, seed: int) -> None:
    generator = random.Random(seed)
    path = Path(shutil.copytree(made, place / f"run{seed}.zarr"))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = generator.choice(files)
    change: Callable[[Path, random.Random], None] = generator.choice([flip, cut, remove])
    before, name = file.read_bytes(), str(file.relative_to(path))
    change(file, generator)
    what = f"seed {seed}: {change.__name__} {name}"
    report = found_by_verify(path)
    if report is not None and report.ok and not report.missing:
        assert is_irrelevant(before, file), what
    repair(problem(), path, progress=False, **OPTIONS)
    again = verify(path)
    assert again.ok, (what, again.damaged)
    assert again.missing == 0, what
    wanted, got = array_bytes(made), array_bytes(path)
    chunks = [key for key in wanted if not key.endswith("zarr.json")]
    assert [key for key in chunks if got.get(key) != wanted[key]] == [], what
    np.testing.assert_array_equal(disthess.open_store(path).dense(), disthess.open_store(made).dense())
    shutil.rmtree(path)


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_is_found_and_repaired(made: Path, tmp_path: Path, seed: int) -> None:
    disturb(made, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(12))
def test_any_damage_is_found_and_repaired_many_times(made: Path, tmp_path: Path, block: int) -> None:
    for seed in range(100 + 10 * block, 110 + 10 * block):
        disturb(made, tmp_path, seed)


def test_exactly_the_damaged_tiles_are_computed(made: Path, copy: Path, computed: list[int]) -> None:
    layout = Store.open(copy).layout
    victims = sorted((copy / "panels/ggn").rglob("c/*/*"))[:1]
    victims += sorted((copy / "activations/hessian").rglob("c/*/*"))[:1]
    for file in victims:
        flip(file, random.Random(1))
    report = verify(copy)
    bad = sorted({entry.tile for entry in report.damaged if entry.kind == "tile"})
    done = repair(problem(), copy, progress=False, **OPTIONS)
    assert sorted(computed) == bad == list(done.computed)
    assert 0 < len(bad) < len(layout.tiles)
    assert array_bytes(copy) == array_bytes(made)
    assert verify(copy).ok
    assert all(disthess.open_store(copy).certificate(part).passed for part in OPTIONS["parts"])


def test_what_was_missing_before_is_left_to_the_run(copy: Path, computed: list[int]) -> None:
    store = Store.open(copy, writable=True)
    store.mark_missing([0])
    store.mark_reduced(False)
    tile = store.layout.tiles[2]
    panel = store.layout.panels_of(tile.source)[0]
    flip(copy / panel.path("hessian") / "c" / str(tile.span.start // panel.row_chunk) / "0", random.Random(0))
    done = repair(problem(), copy, progress=False, **OPTIONS)
    assert set(computed) == {2}
    assert done.missing in (0, 1)


@pytest.mark.parametrize(
    ("lie", "kind"),
    [
        ("done", "tile"),
        ("checksum", "tile"),
        ("written_bytes", "ledger"),
        ("missing", "ledger"),
        ("state", "ledger"),
        ("reduced", "sum"),
        ("stale sums", "sum"),
        ("gradient", "plain"),
    ],
)
def test_a_ledger_that_lies_is_named_and_mended(
    made: Path, copy: Path, lie: str, kind: str, computed: list[int]
) -> None:
    store = Store.open(copy, writable=True)
    ledger, tile = store.root["ledger"], store.layout.tiles[1]
    panel = store.layout.panels_of(tile.source)[0]
    summed = next(panel for panel in store.layout.panels if panel.reduced)
    if lie == "done":
        shutil.rmtree(copy / panel.path("hessian") / "c")
    elif lie in ("checksum", "written_bytes"):
        ledger[lie][1] += 5
    elif lie in ("missing", "state"):
        ledger["state"][1] = {"missing": 0, "state": 77}[lie]
    elif lie == "reduced":
        shutil.rmtree(copy / summed.path("hessian") / "c")
    elif lie == "stale sums":
        store.array(summed, "hessian")[0, 0] += 1.0
    else:
        shutil.rmtree(copy / "gradient/c")
    report = verify(copy)
    entries = [entry for entry in report.damaged if entry.kind == kind]
    assert entries, report
    place = entries[0].place
    assert panel.source in place or summed.source in place or "gradient" in place
    assert entries[0].message
    done = repair(problem(), copy, progress=False, **OPTIONS)
    if kind != "tile" and lie != "state":
        assert computed == []
    assert done.missing == 0
    assert array_bytes(copy) == array_bytes(made)
    assert verify(copy).ok


def test_a_damaged_result_is_removed_and_the_rest_kept(copy: Path) -> None:
    names = Store.open(copy).result_names()
    victim = next(name for name in names if name.startswith("lowrank"))
    flip(next(file for file in (copy / victim / "vectors").rglob("c/*/*")), random.Random(0))
    assert [entry.where for entry in verify(copy).damaged] == [victim]
    assert repair(problem(), copy, progress=False, **OPTIONS).removed == (victim,)
    assert Store.open(copy).result_names() == tuple(name for name in names if name != victim)


def test_the_root_is_written_again_only_for_its_own_problem(made: Path, copy: Path) -> None:
    (copy / "zarr.json").write_bytes(b"{")
    with pytest.raises(StoreError, match="damaged"):
        verify(copy)
    with pytest.raises(StoreError, match="does not show that it belongs"):
        repair(problem(seed=4), copy, progress=False, **OPTIONS)
    assert (copy / "zarr.json").read_bytes() == b"{"
    assert repair(problem(), copy, progress=False, **OPTIONS).root_restored
    assert json.loads((copy / "zarr.json").read_bytes()) == json.loads((made / "zarr.json").read_bytes())


def test_another_problem_is_refused_before_anything_changes(copy: Path) -> None:
    before = array_bytes(copy)
    with pytest.raises(DisthessError, match="another problem"):
        repair(problem(seed=4), copy, progress=False, **OPTIONS)
    assert array_bytes(copy) == before


FACTORY = """
import sys
sys.path.insert(0, {here!r})
from test_repair import problem
"""


def test_the_command_line_repairs_with_a_run_file(made: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "factory.py").write_text(FACTORY.format(here=str(Path(__file__).parent)))
    (tmp_path / "run.yaml").write_text(
        f"problem: {{factory: {tmp_path}/factory.py:problem}}\n"
        f"compute: {{store: {copy}, threads: 1, parts: [hessian, ggn], shared: uses, activations: ['1'], dtype: float64}}\n"
    )
    flip(next(file for file in sorted((copy / "uses/ggn").rglob("c/*/*"))), random.Random(2))
    runner = CliRunner()
    first = runner.invoke(app, ["verify", str(copy)])
    assert first.exit_code == 1
    assert "1 damaged" in first.output
    assert "--repair --config CONFIG" in first.output
    alone = runner.invoke(app, ["verify", str(copy), "--config", str(tmp_path / "run.yaml")])
    assert alone.exit_code == 2
    mended = runner.invoke(app, ["verify", str(copy), "--repair", "--config", str(tmp_path / "run.yaml")])
    assert mended.exit_code == 0, mended.output
    assert "computed again: 1 tiles" in mended.output
    assert runner.invoke(app, ["verify", str(copy)]).exit_code == 0
    assert array_bytes(copy) == array_bytes(made)


def test_the_store_holds_no_pickles_and_no_objects(made: Path) -> None:
    for file in made.rglob("*"):
        if file.is_file():
            raw = file.read_bytes()
            assert b"pickle" not in raw, file
            assert raw[:1] != b"\x80" or file.name != "zarr.json"
        if file.name == "zarr.json":
            value = json.loads(file.read_bytes())
            if value["node_type"] == "array":
                assert np.dtype(value["data_type"]).kind in "fiu", file
                assert [codec["name"] for codec in value["codecs"]] == ["bytes", "crc32c"], file
    assert api.open_store(made).missing_tiles() == ()


def test_a_run_leaves_no_half_written_chunk_of_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_tiles = api.compute_tiles

    def disturbed(store: Store, *rest: Any) -> None:
        compute_tiles(store, *rest)
        chunk = next(file for file in (Path(store.path) / "panels").rglob("c/0/0") if file.is_file())
        chunk.with_name("0.f3cc16.partial").write_bytes(b"half")

    monkeypatch.setattr(api, "compute_tiles", disturbed)
    disthess.compute(problem(), tmp_path / "run.zarr", progress=False, **OPTIONS)
    assert not list((tmp_path / "run.zarr").rglob("*.partial"))
    assert verify(tmp_path / "run.zarr").ok
