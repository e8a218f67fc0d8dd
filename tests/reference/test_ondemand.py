"""Blocks computed on demand against the dense Hessian of autograd; and a cache that is killed, damaged, or of another problem."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cases import CASES, Case
from torch import nn
from typer.testing import CliRunner

import disthess
from disthess import hvp
from disthess.cli.main import app
from disthess.errors import CertificateError, ConfigError, PlanError, StoreError
from disthess.execute import strips
from disthess.execute.memory import PeakMemory
from disthess.store.cache import CacheStore
from disthess.store.lock import StoreLock
from disthess.store.store import Store

QUICK = {
    *("tied_language_model", "cnn", "attention", "batch_norm_train", "weight_decay", "mlp_two_batches_sum"),
    *("branch_on_value", "group_norm", "odd_shapes"),
}
SOME = [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow) for case in CASES]


def problem(seed: int = 3) -> disthess.Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    batches = [(torch.randn(size, 4, dtype=torch.float64), torch.randint(3, (size,))) for size in (5, 7)]
    return disthess.Problem(model, loss="cross_entropy", batches=batches, weight_decay={"*bias": 0.3})


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("case", SOME)
def test_the_whole_matrix_block_by_block_is_that_of_autograd(case: Case, tmp_path: Path) -> None:
    data = case.make()
    wanted = np.asarray(disthess.reference_hessian(data))
    size = len(wanted)
    cache = disthess.open_cache(tmp_path / "double.zarr", data, chunk=16)
    middle = size // 2
    # In pieces that meet no boundary of a chunk, the lower triangle first.
    low = cache.read(slice(middle + 1, size), slice(0, middle + 1), compute=True)
    whole = cache.read(slice(0, size), slice(0, size), compute=True)
    assert cache.products <= size + middle + 32
    assert relative(whole, wanted) < 1e-10
    assert np.array_equal(whole, whole.T)
    assert np.array_equal(low, whole[middle + 1 :, : middle + 1])
    # Against the dense Hessian of the float32 problem's own values in float64, so that only computing is compared.
    narrow = disthess.Problem.to(data, torch.float32)
    exact = np.asarray(disthess.reference_hessian(narrow.to(torch.float64)))
    single = disthess.open_cache(tmp_path / "single.zarr", narrow, chunk=64).read(
        slice(0, size), slice(0, size), compute=True
    )
    assert single.dtype == np.float32
    assert relative(single, exact) < 1e-5


def test_rows_and_columns_are_said_in_many_ways(tmp_path: Path) -> None:
    data = problem()
    wanted = np.asarray(disthess.reference_hessian(data))
    cache = disthess.open_cache(tmp_path / "c.zarr", data, chunk=8)
    weight, last = slice(0, 24), slice(42, 60)
    cut = np.arange(24).reshape(6, 4)[:, 1:3].reshape(-1)
    for rows, places in (
        ("0.weight", np.arange(60)[weight]),
        ("0.weight[2:4]", np.arange(8, 16)),
        ("0.weight[:, 1:3]", cut),
        (("0.weight[:, 1:3]", slice(2, 5)), cut[2:5]),
        (("3.weight", slice(4, None)), np.arange(60)[last][4:]),
        (slice(3, 5), np.arange(3, 5)),
        (range(7, 9), np.arange(7, 9)),
        (-1, np.array([len(wanted) - 1])),
        (11, np.array([11])),
    ):
        found = cache.read(rows, "3.weight", compute=True)
        assert found.shape == (len(places), 18), rows
        assert np.allclose(found, wanted[places][:, last], rtol=0, atol=1e-12), rows
        assert np.array_equal(cache.read("3.weight", rows), found.T), rows
    for wrong in (slice(0, 8, 2), slice(5, 5), slice(0, 10_000), 3.5, ("0.weight", slice(0, 99)), ("0.weight",)):
        with pytest.raises(ConfigError):
            cache.read(wrong, 0)
    with pytest.raises(StoreError, match="near names"):
        cache.read("0.wight", 0)


def test_what_is_there_is_read_without_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, path = problem(), tmp_path / "c.zarr"
    first = disthess.open_cache(path, data, chunk=8)
    plan = first.plan("0.bias", "3.bias")
    assert (plan.rows, plan.columns, plan.chunks, plan.batches) == (6, 3, 1, 2)
    assert "have to be computed: 7 Hessian-vector products through 2 batches" in plan.describe()
    block = first.block("0.bias", "3.bias", compute=True)
    assert first.products == plan.products == 7
    nothing = first.plan("3.bias", "0.bias")
    assert (nothing.missing, nothing.products, nothing.written_bytes) == (0, 0, 0)

    def refuse(*_: object) -> None:
        raise AssertionError("something is computed")

    monkeypatch.setattr("disthess.sweep.region.RegionTape.__init__", refuse)
    monkeypatch.setattr("disthess.problem.Problem.value", refuse)
    again = disthess.open_cache(path, data)
    assert np.array_equal(again.block("3.bias", "0.bias", compute=True), block.T)
    assert again.products == 0
    alone = disthess.open_cache(path)
    assert np.array_equal(alone.block("0.bias", "3.bias"), block)
    with pytest.raises(StoreError, match="compute=True"):
        alone.block("0.bias", "0.bias")
    with pytest.raises(ConfigError, match="needs the problem"):
        alone.block("0.bias", "0.bias", compute=True)
    assert len(again.records()) == 1
    assert all(entry.error < 1e-12 and entry.dtype == "float64" for entry in again.records())


def test_any_reader_of_zarr_reads_it_and_the_rest_takes_no_space(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2))
    data = disthess.Problem(model, loss="mse", batches=[(torch.randn(3, 300), torch.randn(3, 2))])
    path = tmp_path / "c.zarr"
    cache = disthess.open_cache(path, data, chunk=64)
    found = cache.read(slice(0, 64), "2.bias", compute=True)
    group = zarr.open_group(path, mode="r")
    start = 300 * 300 + 300 + 600
    assert np.array_equal(group["hessian"][0:64, start : start + 2], found)
    assert np.isnan(group["hessian"][64:70, 64:70]).all()
    assert set(dict(group.members())) == {"hessian", "ledger"}
    assert sum(file.stat().st_size for file in path.rglob("*")) < 60_000
    loss = nn.functional.mse_loss(model(data.batches[0][0]), data.batches[0][1])
    (slope,) = torch.autograd.grad(loss, model[2].bias, create_graph=True)
    rows = [torch.autograd.grad(entry, model[0].weight, retain_graph=True)[0].reshape(-1)[:64] for entry in slope]
    wanted = torch.stack(rows, dim=1)
    assert relative(found, wanted.numpy()) < 1e-5


def test_a_block_that_is_zero_but_for_rounding_passes(tmp_path: Path) -> None:
    torch.manual_seed(1)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attend(x, x, x)[0].mean(1))

    data = disthess.Problem(Attend(), loss="mse", batches=[(torch.randn(3, 5, 4), torch.randn(3, 2))])
    cache = disthess.open_cache(tmp_path / "c.zarr", data, chunk=4)
    # The bias of the keys moves all scores of a query together, and changes nothing.
    found = cache.block("attend.in_proj_bias[4:8]", "attend.in_proj_weight[0:4]", compute=True)
    assert np.abs(found).max() < 1e-8
    assert cache.products == 4


def test_a_wrong_second_derivative_of_torch_is_refused(tmp_path: Path) -> None:
    class Wrong(torch.autograd.Function):
        """A square whose gradient's own derivative is a tenth off."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return grad * (2 * x.detach() + 1.8 * (x - x.detach()))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Wrong.apply(self.weight * x)

    x = torch.randn(4, 3, dtype=torch.float64)
    data = disthess.Problem(Model(), loss="mse", batches=[(x, torch.zeros_like(x))])
    cache = disthess.open_cache(tmp_path / "c.zarr", data)
    with pytest.raises(CertificateError, match="central differences"):
        cache.block("weight", "weight", compute=True)
    assert cache.store.present() == ()


def test_a_wrong_block_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = disthess.open_cache(tmp_path / "c.zarr", problem(), chunk=16)
    right = strips.RegionEngine.region
    monkeypatch.setattr(strips.RegionEngine, "region", lambda *given: right(*given) * (1 + 1e-8))
    with pytest.raises(CertificateError, match="disagrees with another product"):
        cache.read(slice(0, 16), slice(0, 16), compute=True)
    assert cache.store.present() == ()
    with pytest.raises(StoreError, match="are not in"):
        cache.read(slice(0, 16), slice(0, 16))


KILLED = """
import os, sys
sys.path[:0] = {folders!r}
import test_ondemand, disthess
from disthess.store.cache import CacheStore
CacheStore.mark = lambda *_: os._exit(9)
disthess.open_cache(sys.argv[1], test_ondemand.problem(), chunk=8).read(slice(0, 8), slice(8, 24), compute=True)
"""


def test_a_kill_between_data_and_ledger_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    tests = Path(__file__).parents[1]
    script = KILLED.format(folders=[str(tests), str(tests / "reference")])
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    opened = CacheStore.open(path)
    assert opened.present() == ()
    assert (path / "hessian/c/0/1").exists()
    report = opened.verify()
    assert (report.checked, report.unmarked, report.ok) == (0, 1, True)
    # The lock of the killed process is taken over.
    cache = disthess.open_cache(path, problem(), chunk=8)
    found = cache.read(slice(0, 8), slice(8, 24), compute=True)
    assert relative(found, np.asarray(disthess.reference_hessian(problem()))[0:8, 8:24]) < 1e-10
    other = disthess.open_cache(tmp_path / "undisturbed.zarr", problem(), chunk=8)
    assert np.array_equal(other.read(slice(0, 8), slice(8, 24), compute=True), found)


def test_damage_is_found_forgotten_and_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    cache = disthess.open_cache(path, problem(), chunk=8)
    whole = cache.read(slice(0, 16), slice(0, 16), compute=True)
    chunk, record = path / "hessian/c/0/1", path / "ledger/0.0/zarr.json"
    data = bytearray(chunk.read_bytes())
    data[20] ^= 1
    chunk.write_bytes(bytes(data))
    tree = json.loads(record.read_text())
    tree["attributes"]["error"] = 0.0
    record.write_text(json.dumps(tree))
    for columns in (slice(0, 8), slice(8, 16)):
        with pytest.raises(StoreError, match="damaged"):
            cache.read(slice(0, 8), columns, compute=True)
    assert len(cache.store.verify().damaged) == 2
    (path / "hessian/c/1/1").unlink()
    found = CliRunner().invoke(app, ["verify", str(path)])
    assert found.exit_code == 1
    assert "3 damaged" in found.output or "3 other" in found.output, found.output
    mended = CliRunner().invoke(app, ["verify", str(path), "--repair"])
    assert mended.exit_code == 0, mended.output
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 0
    before = cache.products
    assert np.array_equal(cache.read(slice(0, 16), slice(0, 16), compute=True), whole)
    assert cache.products == before + 16


def test_another_problem_or_kind_of_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    disthess.open_cache(path, problem(), chunk=8).read(0, 0, compute=True)
    with pytest.raises(StoreError, match=r"another problem.*batches"):
        disthess.open_cache(path, problem(seed=4))
    with pytest.raises(StoreError, match="another problem"):
        disthess.open_cache(path, problem(), parameters="0.*")
    with pytest.raises(StoreError, match="cache of single blocks"):
        disthess.open_store(path)
    disthess.compute(problem(), tmp_path / "whole.zarr")
    with pytest.raises(StoreError, match="no cache"):
        disthess.open_cache(tmp_path / "whole.zarr", problem())
    with pytest.raises(StoreError, match="There is no store"):
        disthess.open_cache(tmp_path / "nowhere.zarr")
    tree = json.loads((path / "zarr.json").read_text())
    tree["attributes"]["chunk"] = 4
    (path / "zarr.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match="cannot be trusted"):
        disthess.open_cache(path)


def test_two_processes_do_not_compute_into_one_cache_at_once(tmp_path: Path) -> None:
    cache = disthess.open_cache(tmp_path / "c.zarr", problem(), chunk=8)
    cache.read(0, 0, compute=True)
    with StoreLock(tmp_path / "c.zarr"):
        assert cache.read(slice(0, 8), slice(0, 8), compute=True).shape == (8, 8)
        with pytest.raises(StoreError, match="is being written by"):
            cache.read(slice(0, 8), slice(8, 16), compute=True)


def test_what_does_not_fit_is_refused_with_sizes(tmp_path: Path) -> None:
    cache = disthess.open_cache(tmp_path / "c.zarr", problem(), memory_bytes=1000)
    with pytest.raises(PlanError, match=r"would take up to .* are allowed"):
        cache.read(0, 0, compute=True)
    wide = nn.Linear(1500, 1500)
    data = disthess.Problem(wide, loss="mse", batches=[(torch.ones(1, 1500), torch.ones(1, 1500))])
    huge = disthess.open_cache(tmp_path / "e.zarr", data)
    with pytest.raises(PlanError, match=r"2,250,000 x 2,250,000 entries, which take 20\.\d* TB"):
        huge.block("weight", "weight", compute=True)


def test_an_unfinished_store_computes_what_is_asked_for(tmp_path: Path) -> None:
    data, path = problem(), tmp_path / "s.zarr"
    wanted = np.asarray(disthess.reference_hessian(data))
    whole = disthess.compute(data, path)
    assert np.allclose(whole.read(slice(3, 50), slice(20, 60)), wanted[3:50, 20:60], rtol=0, atol=1e-12)
    assert np.allclose(
        whole.read(("0.weight[:, 0:2]", slice(0, 3)), "3.bias"), wanted[[0, 1, 4]][:, -3:], rtol=0, atol=1e-12
    )
    tiles = whole.layout.tiles
    raw = Store.open(path, writable=True)
    raw.mark_missing([tile.index for tile in tiles])
    raw.mark_reduced(False)
    bare = disthess.open_store(path)
    with pytest.raises(StoreError, match="are missing"):
        bare.read("0.weight", "3.bias")
    with pytest.raises(ConfigError, match="needs the problem"):
        bare.read("0.weight", "3.bias", compute=True)
    store = disthess.open_store(path, data)
    assert np.allclose(store.read("0.weight", "3.bias", compute=True), wanted[:24, -3:], rtol=0, atol=1e-12)
    left = {tiles[index].source for index in store.missing_tiles()}
    assert left
    assert "0.weight" not in left
    everything = store.read(slice(0, len(wanted)), slice(0, len(wanted)), compute=True)
    assert np.allclose(everything, wanted, rtol=0, atol=1e-12)
    assert store.missing_tiles() == ()
    assert store.certificate() is not None
    raw.mark_missing([tile.index for tile in tiles])
    other = disthess.open_store(path, problem(seed=5))
    with pytest.raises(StoreError, match="another problem"):
        other.read(0, 0, compute=True)


CONFIG = """
problem:
  factory: small:make
compute:
  store: unused.zarr
"""


def test_the_command_line_computes_reads_and_says_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tests = str(Path(__file__).parent)
    (tmp_path / "small.py").write_text(
        textwrap.dedent(f"import sys\nsys.path.insert(0, {tests!r})\nfrom test_ondemand import problem as make\n")
    )
    (tmp_path / "run.yaml").write_text(CONFIG)
    run = CliRunner().invoke
    ask = ["block", "c.zarr", "0.weight[1:3]", "3.weight", "--cols", "2:5", "--out", "block.npy"]
    assert run(app, [*ask, "--compute"]).exit_code == 2
    first = run(app, [*ask, "--compute", "--config", "run.yaml"])
    assert first.exit_code == 0, first.output
    assert "have to be computed" in first.output
    wanted = np.asarray(disthess.reference_hessian(problem()))[4:12, 44:47]
    assert np.allclose(np.load("block.npy"), wanted, rtol=0, atol=1e-12)
    again = run(app, [*ask, "--compute", "--config", "run.yaml"])
    assert "nothing to compute" in again.output
    assert run(app, ask).exit_code == 0
    told = json.loads(run(app, ["info", "c.zarr", "--json"]).output)
    assert (told["kind"], told["chunks"], told["numel"]) == ("cache", 1, 63)
    shown = run(app, ["info", "c.zarr"])
    assert shown.exit_code == 0
    assert "chunks     1 of 63 x 63" in shown.output
    assert run(app, ["block", "c.zarr", "0.weight", "3.wight"]).exit_code == 1
    assert run(app, ["block", "c.zarr", "0.weight", "3.weight", "--rows", "7"]).exit_code == 2


@pytest.mark.slow
def test_memory_stays_below_what_is_planned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 900), nn.GELU(), nn.Linear(900, 600), nn.LayerNorm(600), nn.Linear(600, 9))
    data = disthess.Problem(
        model, loss="cross_entropy", batches=[(torch.randn(400, 600), torch.randint(9, (400,))) for _ in range(2)]
    )
    allowed = 160 << 20
    cache = disthess.open_cache(tmp_path / "c.zarr", data, memory_bytes=allowed)
    cache.read(0, 0, compute=True)
    plan = cache.plan("3.weight", "2.weight[0:1]")
    assert plan.peak_bytes <= allowed
    with PeakMemory() as peak:
        cache.read("3.weight", "2.weight[0:1]", compute=True)
        assert peak.rise_bytes() <= allowed


class Encoder(nn.Module):
    """Six layers of a transformer over an embedding: 23 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Embedding(8000, 512), nn.Linear(512, 10)
        self.body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(tokens)).mean(1))


@pytest.mark.slow
def test_a_tile_and_the_norms_of_a_transformer_of_23_million_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = disthess.Problem(
        Encoder().eval(),
        loss="cross_entropy",
        batches=[(torch.randint(8000, (2, 4)), torch.randint(10, (2,)))],
    )
    assert data.numel > 23_000_000
    a, b = "body.layers.3.linear1.weight[0:2]", "body.layers.4.self_attn.in_proj_weight[8:10]"
    cache = disthess.open_cache(tmp_path / "c.zarr", data)
    tile = cache.read(a, b, compute=True)
    assert tile.shape == (1024, 1024)
    assert max(entry.error for entry in cache.records()) < 1e-5
    # A column of it by a product of the whole model in float64.
    names = [entry.name for entry in cache.parameters]
    starts = dict(zip(names, np.cumsum([0, *(entry.numel for entry in cache.parameters)]).tolist(), strict=False))
    exact = data.to(torch.float64)
    vector = torch.zeros(1, data.numel, dtype=torch.float64)
    vector[0, starts["body.layers.4.self_attn.in_proj_weight"] + 8 * 512 + 7] = 1
    product = hvp.hessian_vector_products(exact, names, vector)[0]
    start = starts["body.layers.3.linear1.weight"]
    assert relative(tile[:, 7], product[start : start + 1024].numpy()) < 1e-4
    norms = disthess.compute(
        data, tmp_path / "n.zarr", parameters=["body.layers.5.norm2.*"], dtype="float32", progress=False
    )
    assert norms.numel == 1024
    assert norms.certificate().passed
    assert np.abs(norms.block("body.layers.5.norm2.bias", "body.layers.5.norm2.bias")).max() > 0
