"""Pages about runs: numbers against the dense Hessian, verdicts, what is left out, stores that are not done."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Element, check_page, number_of, rows_of
from typer.testing import CliRunner

import disthess
from disthess.cli.main import app
from disthess.errors import ConfigError, StoreError
from disthess.reports import run_findings
from disthess.reports.render import to_html, write_page
from disthess.reports.run_findings import find_run
from disthess.reports.run_page import run_page
from disthess.store.store import Store

EVIL = "<script>alert(1)</script>&$x_1$"


def problem() -> disthess.Problem:
    """38 parameters; the first sample sits at the kink of every unit."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2)
    first.bias.data.zero_()
    model = torch.nn.Sequential()
    model.add_module("first", first)
    model.add_module("act", torch.nn.ReLU())
    model.add_module("second", second)
    inputs = torch.randn(12, 3)
    inputs[0] = 0
    return disthess.Problem(model.double(), loss="cross_entropy", batches=[(inputs.double(), torch.arange(12) % 2)])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.zarr"
    options = {"parts": ("hessian", "ggn"), "activations": ["first", "second"], "threads": 1}
    disthess.compute(problem(), path, progress=False, **options)
    return path


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy.zarr"))


@pytest.fixture(scope="module")
def text(path: Path) -> str:
    out = disthess.report(path, path.parent / "run.html")
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    return check_page(text)


@pytest.fixture(scope="module")
def hessian() -> np.ndarray:
    return np.asarray(disthess.reference_hessian(problem()))


def test_the_numbers_are_those_of_the_dense_hessian(page: Element, hessian: np.ndarray) -> None:
    values = np.linalg.eigvalsh(hessian)
    norm = np.linalg.norm(values)
    for term, expected in (
        ("parameters", 38),
        ("largest eigenvalue", values[-1]),
        ("smallest eigenvalue", values[0]),
        ("learning-rate limit 2 / λmax", 2 / values[-1]),
        ("trace", values.sum()),
        ("Frobenius norm", norm),
        ("effective rank", values.sum() ** 2 / norm**2),
        ("stable rank", norm**2 / np.abs(values).max() ** 2),
        ("negative eigenvalues", np.mean(values < -1e-12)),
    ):
        assert number_of(page, term) == pytest.approx(expected, rel=1e-8), term


def test_loss_and_gradient_are_those_of_the_model(page: Element) -> None:
    made = problem()
    inputs, targets = made.batches[0]
    model = made.model
    loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert number_of(page, "loss") == pytest.approx(loss.item(), rel=1e-12)
    assert number_of(page, "gradient norm") == pytest.approx(float(slope.norm()), rel=1e-10)


def test_blocks_have_their_norms_traces_and_couplings(page: Element, hessian: np.ndarray) -> None:
    rows = rows_of(page, "parameters")
    names = [row[0] for row in rows]
    assert names == ["first.weight", "first.bias", "second.weight", "second.bias"]
    spans = [slice(0, 18), slice(18, 24), slice(24, 36), slice(36, 38)]
    norms = np.array([[np.linalg.norm(hessian[a, b]) for b in spans] for a in spans])
    for row, span, own in zip(rows, spans, np.diag(norms), strict=True):
        assert float(row[4]) == pytest.approx(own, rel=1e-3)
        assert float(row[5].replace("−", "-")) == pytest.approx(np.trace(hessian[span, span]), rel=1e-3)
    coupling = norms / np.sqrt(np.outer(np.diag(norms), np.diag(norms)))
    best = np.sort(coupling[np.triu_indices(4, 1)])[::-1]
    assert [float(row[2]) for row in rows_of(page, "pairs")] == pytest.approx(best, rel=1e-3)


def test_the_certificate_is_the_verdict(page: Element) -> None:
    assert "Certified." in page.all("header")[0].text
    assert {row[0]: row[1] for row in rows_of(page, "certificates")} == {
        "hessian": "passed",
        "ggn": "passed",
        "activations": "passed",
    }


def test_the_ggn_is_said_to_be_semi_definite_and_has_its_share(page: Element, path: Path, hessian: np.ndarray) -> None:
    section = next(e for e in page.all("section") if e.attributes["id"] == "gauss-newton")
    assert "positive semi-definite" in section.text
    ggn = np.trace(disthess.open_store(path).dense("ggn"))
    assert number_of(page, "GGN share") == pytest.approx(ggn / (ggn + abs(np.trace(hessian) - ggn)), rel=1e-8)


def test_kinks_and_activations_have_their_sections(page: Element) -> None:
    kinks = rows_of(page, "kink-table")
    assert len(kinks) == 1
    assert kinks[0][2:4] == ["6", "1"]
    assert [row[0] for row in rows_of(page, "activation-table")] == ["first", "second"]


def test_the_same_store_gives_the_same_bytes(path: Path, text: str, tmp_path: Path) -> None:
    assert disthess.report(path, tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_stored_results_are_reused(copy: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disthess.eigenvalues(disthess.open_store(copy), k=12)
    disthess.spectral_density(disthess.open_store(copy))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("disthess.linalg.lanczos.extreme_eigenpairs", refuse)
    monkeypatch.setattr("disthess.linalg.density.spectral_density", refuse)
    found = find_run(disthess.open_store(copy), top=12, seconds=1e9)
    assert len(found.pairs.values) == 24
    assert found.density is not None


def test_what_would_take_long_is_left_out_and_said(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Path(shutil.copytree(path, tmp_path / "fresh.zarr"))
    for name in Store.open(fresh).result_names():
        if not name.startswith("certificate"):
            Store.open(fresh, writable=True).remove_result(name)
    monkeypatch.setattr(run_findings, "BYTES_PER_SECOND", 1.0)
    store = disthess.open_store(fresh)
    found = find_run(store, top=3, seconds=5.0)
    assert (found.pairs, found.density, found.blocks, found.definite) == (None, None, None, None)
    assert len(found.left_out) == 5
    page = check_page(to_html(run_page(store, found)))
    assert "Left out" in page.all("header")[0].text
    assert "disthess spectrum STORE --top 3" in page.text
    assert number_of(page, "loss") == pytest.approx(store.loss)


def test_an_unfinished_store_says_so_on_top(copy: Path, tmp_path: Path) -> None:
    store = Store.open(copy, writable=True)
    store.mark_missing([0])
    store.quarantine(1, f"ran out of memory {EVIL}")
    text = disthess.report(copy, tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_page(text)
    assert "Unfinished." in page.all("header")[0].text
    assert f"2 of {len(store.layout.tiles)} tiles are missing" in page.all("header")[0].text
    assert "Certified" not in page.all("header")[0].text
    assert rows_of(page, "quarantined")[0][2] == f"ran out of memory {EVIL}"
    assert "<script" not in text


def test_a_store_without_a_certificate_is_not_called_certified(copy: Path, tmp_path: Path) -> None:
    for part in ("hessian", "ggn", "activations"):
        Store.open(copy, writable=True).remove_result(f"certificate/{part}")
    header = check_page(disthess.report(copy, tmp_path / "page.html").read_text(encoding="utf-8")).all("header")[0].text
    assert "Complete, without a certificate." in header
    assert "Certified" not in header


def test_parameter_names_are_escaped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({EVIL.replace(".", ""): torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    data = torch.randn(4, 2)

    def objective(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        for layer in module.values():
            batch = torch.tanh(layer(batch))
        return batch.square().mean()

    made = disthess.Problem(model, objective=objective, batches=[data])
    disthess.compute(made, tmp_path / "run.zarr", method="autograd", dtype="float64", progress=False, threads=1)
    text = disthess.report(tmp_path / "run.zarr", tmp_path / "page.html", title=EVIL).read_text(encoding="utf-8")
    assert "<script" not in text
    assert EVIL in check_page(text).text


@pytest.mark.parametrize("name", ["nothing.zarr", "folder", "file"])
def test_what_is_neither_store_nor_history_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError):
        disthess.report(tmp_path / name, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    for out in (tmp_path / "folder", tmp_path / "file" / "page.html"):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_page("text", out)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigError, match="No space left"):
        write_page("new", out)
    assert out.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_wrong_arguments_are_refused(path: Path, tmp_path: Path) -> None:
    for wrong in ({"top": 0}, {"seconds": -1.0}, {"seconds": float("nan")}):
        with pytest.raises(ConfigError):
            disthess.report(path, tmp_path / "page.html", **wrong)


def test_the_verb_writes_the_page_and_says_where(path: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(path), "--out", str(out), "--title", "Digits"])
    assert done.exit_code == 0, done.output
    assert str(out) in done.output
    page = check_page(out.read_text(encoding="utf-8"))
    assert page.all("h1")[0].text == "Digits"


def test_the_verb_has_no_traceback_for_a_wrong_path(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path / "no.zarr"), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 1
    assert "neither a store nor a history" in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_small_tops_shorten_tables(path: Path, tmp_path: Path) -> None:
    page = check_page(disthess.report(path, tmp_path / "page.html", top=2).read_text(encoding="utf-8"))
    assert len(rows_of(page, "eigenvalues")) == 4
    assert len(rows_of(page, "pairs")) == 2
