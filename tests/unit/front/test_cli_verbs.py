"""The command line end to end on a small problem: every verb, what it prints, and its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import disthess
from disthess import api
from disthess.cli.main import app
from disthess.errors import Interrupted, ProblemError

FACTORY = """
import torch
import disthess

def problem(width=4, nan=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
    if nan:
        model[0].weight.data[0, 0] = float("nan")
    return disthess.Problem(model, loss="cross_entropy", batches=[(torch.randn(20, 3), torch.randint(0, 2, (20,)))])
"""
CONFIG = """
problem:
  factory: small.py:problem
compute: {store: STORE, dtype: float64}
report: {eigenvalues: 3, blocks: 4}
"""
NUMEL = 4 * 3 + 4 + 2 * 4 + 2


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.py").write_text(FACTORY)
    (folder / "run.yaml").write_text(CONFIG.replace("STORE", str(folder / "run.zarr")))
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> Result:
    return call("run", folder / "run.yaml")


@pytest.fixture
def store(folder: Path, ran: Result) -> Path:
    assert ran.exit_code == 0, ran.output
    return folder / "run.zarr"


def test_run_prints_plan_certificate_eigenvalues_blocks_and_places(folder: Path, ran: Result) -> None:
    assert ran.exit_code == 0, ran.output
    for words in (f"P = {NUMEL}", "certificate hessian: passed", "extreme eigenvalues", "largest blocks", "run.zarr"):
        assert words in ran.output
    assert "||Hv - lambda v||" in ran.output
    for picture in ("spectrum.png", "blocks.png"):
        assert (folder / "run.pictures" / picture).stat().st_size > 1000


def test_running_again_computes_nothing_and_says_the_same(folder: Path, store: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in (store / "panels").rglob("c/*")}
    again = call("run", folder / "run.yaml")
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in (store / "panels").rglob("c/*")} == written


def test_plan_writes_nothing_and_speaks_json(folder: Path) -> None:
    target = folder / "planned.zarr"
    text, tree = call("plan", folder / "run.yaml", "--store", target), call("plan", folder / "run.yaml", "--json")
    assert text.exit_code == tree.exit_code == 0, text.output + tree.output
    assert f"P = {NUMEL}" in text.output
    assert json.loads(tree.stdout)["numel"] == NUMEL
    assert not target.exists()


def test_plan_takes_machines_that_are_not_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disthess.api.is_device_here", lambda device: device == "cpu")
    there = ("plan", folder / "run.yaml", "--executor", "ray", "--workers", "64", "--device", "cuda")
    given, assumed = call(*there, "--tflops", "40"), call(*there)
    assert given.exit_code == assumed.exit_code == 0, given.output + assumed.output
    assert "at 40 TFLOP/s per worker, as given" in given.output
    assert "at 10 TFLOP/s per worker, which is assumed: torch sees no cuda here" in assumed.output
    for item in ("64 x 1 thread on cuda", "imbalance", "on disk", "This plan took"):
        assert item in given.output
    tree = json.loads(call(*there, "--tflops", "40", "--json").stdout)
    busiest = [0] * 64
    for tile in tree["tiles"]:
        busiest[tile["owner"]] += tile["flops"]
    assert tree["imbalance"] == pytest.approx(64 * max(busiest) / sum(busiest))
    assert tree["flops_per_second"] == 40e12
    assert tree["rate"] == "as given"
    assert tree["seconds"] > 0 < tree["planning_seconds"]
    assert call(*there, "--tflops", "0").exit_code == 2


def test_info_lists_parameters_and_certificate(store: Path) -> None:
    text, tree = call("info", store), json.loads(call("info", store, "--json").stdout)
    assert "2.bias" in text.output
    assert tree["numel"] == NUMEL
    assert [entry["name"] for entry in tree["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert tree["tiles"]["missing"] == 0
    assert tree["certificates"]["hessian"]["passed"] is True


def test_block_saves_what_the_library_reads(store: Path, tmp_path: Path) -> None:
    shown = call("block", store, "0.weight", "2.bias")
    saved = call("block", store, "0.weight", "2.bias", "--out", tmp_path / "new" / "block.npy")
    assert shown.exit_code == saved.exit_code == 0, shown.output + saved.output
    expected = disthess.open_store(store).block("0.weight", "2.bias")
    assert np.array_equal(np.load(tmp_path / "new" / "block.npy"), expected)
    assert "12 x 2" in shown.output
    assert f"{np.linalg.norm(expected):.6e}" in shown.output


def test_kronecker_lists_layers_and_saves_factors(folder: Path, store: Path, tmp_path: Path) -> None:
    text = call("kronecker", store)
    assert text.exit_code == 0, text.output
    assert "0.weight + 0.bias" in text.output
    done = call("kronecker", store, "0", "--config", folder / "run.yaml", "--out", tmp_path / "f", "--json")
    assert done.exit_code == 0, done.output
    nearest, expected = json.loads(done.stdout)
    assert nearest["relative_error"] <= expected["relative_error"]
    assert (nearest["outputs"], nearest["inputs"]) == (4, 4)
    assert len(list((tmp_path / "f").glob("*.safetensors"))) == 4
    wrong = call("kronecker", store, "1")
    assert wrong.exit_code == call("block", store, "1", "1").exit_code == 1
    assert "near names" in wrong.output


def test_compare_prints_one_table(folder: Path, tmp_path: Path) -> None:
    done = call(
        "compare", folder / "run.yaml", "--rank", 3, "--plot", tmp_path / "c.png", "--folder", tmp_path / "kept"
    )
    assert done.exit_code == 0, done.output
    for words in ("exact", "ggn", "block-diagonal", "kronecker, nearest", "low rank 3", "errors relative to"):
        assert words in done.output
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert (tmp_path / "kept" / "exact.zarr").is_dir()
    again = call("compare", folder / "run.yaml", "--folder", tmp_path / "kept")
    assert again.exit_code == 2
    assert "not empty" in again.output


def test_stopping_reads_the_store_or_does_without(folder: Path, store: Path) -> None:
    stored = call("stopping", folder / "run.yaml", "--json")
    free = call("stopping", folder / "run.yaml", "--store", folder / "nowhere.zarr", "--json")
    assert stored.exit_code == free.exit_code == 0, stored.output + free.output
    first, second = json.loads(stored.stdout), json.loads(free.stdout)
    assert first == pytest.approx(second, rel=1e-9, abs=1e-12)
    matrix = disthess.open_store(store).dense()
    assert first["smallest_eigenvalue"] == pytest.approx(np.linalg.eigvalsh(matrix)[0])
    assert first["stop"] is False
    text = call("stopping", folder / "run.yaml", "--tolerance", 1e6)
    assert "go on" in text.output
    assert "newton decrement" in text.output


def test_spectrum_agrees_with_the_dense_matrix(store: Path, tmp_path: Path) -> None:
    done = call("spectrum", store, "--top", 2, "--density", "--plot", tmp_path / "s.png", "--json")
    assert done.exit_code == 0, done.output
    tree = json.loads(done.stdout)
    dense = np.linalg.eigvalsh(disthess.open_store(store).dense())
    found = np.sort([pair["value"] for pair in tree["eigenvalues"]])
    assert np.allclose(found, np.concatenate([dense[:2], dense[-2:]]))
    assert len(tree["density"]["grid"]) == len(tree["density"]["density"])
    assert (tmp_path / "s.png").exists()
    assert "extreme eigenvalues" in call("spectrum", store, "--top", 2).output


def test_lowrank_says_what_it_leaves_out(store: Path, tmp_path: Path) -> None:
    done = call("lowrank", store, "--rank", 3, "--json", "--out", tmp_path / "low.npz")
    assert done.exit_code == 0, done.output
    tree = json.loads(done.stdout)
    assert len(tree["values"]) == 3
    low = np.load(tmp_path / "low.npz")
    assert low["vectors"].shape == (NUMEL, 3)
    assert "rank 3" in call("lowrank", store, "--rank", 3).output


def test_verify_finds_damage_and_run_repairs_it(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.zarr"
    assert call("run", folder / "run.yaml", "--store", path).exit_code == 0
    assert call("verify", path).exit_code == 0
    chunk = sorted(file for file in (path / "panels").rglob("*") if file.is_file() and "/c/" in str(file))[0]
    content = bytearray(chunk.read_bytes())
    content[5] ^= 0xFF
    chunk.write_bytes(content)
    found = call("verify", path, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["damaged"]
    assert call("verify", path, "--repair").exit_code == 0
    assert call("verify", path).exit_code == 1
    assert call("run", folder / "run.yaml", "--store", path).exit_code == 0
    assert json.loads(call("verify", path, "--json").stdout)["whole"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info", "nowhere.zarr"], 1, ["nowhere.zarr"]),
        (["run", "absent.yaml"], 2, ["absent.yaml"]),
        (["run"], 2, ["CONFIG"]),
        (["walk"], 2, ["walk"]),
        (["spectrum", "STORE", "--top", "-1"], 2, ["top"]),
        (["block", "STORE", "0.wieght", "2.bias"], 1, ["0.wieght", "0.weight"]),
        (["block", "STORE", "0.weight", "2.bias", "--out", "/proc/none/b.npy"], 2, ["/proc/none/b.npy"]),
    ],
)
def test_errors_are_one_paragraph_and_an_exit_code(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*[str(store) if argument == "STORE" else argument for argument in arguments])
    assert done.exit_code == code, done.output
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("store:", "stroe:"), 2, ["'stroe'", "did you mean store"]),
        (("small.py:problem", "small.py:problm"), 2, ["problm"]),
        (("small.py:problem", "small.py:problem\n  arguments: {nan: true}"), 1, ["0.weight", "NaN"]),
    ],
)
def test_a_bad_run_file_leaves_no_store(folder: Path, change: tuple[str, str], code: int, words: list[str]) -> None:
    (folder / "bad.yaml").write_text(CONFIG.replace("STORE", str(folder / "bad.zarr")).replace(*change))
    done = call("run", folder / "bad.yaml")
    assert done.exit_code == code, done.output
    for word in words:
        assert word in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "bad.zarr").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ZeroDivisionError("division by zero"), ["this is a bug in disthess: ZeroDivisionError", "--debug"]),
        (KeyboardInterrupt(), ["interrupted", "resumes"]),
        (Interrupted("stopped with 3 of 9 tiles left; run the same again to resume"), ["3 of 9", "resume"]),
        (ProblemError("the loss\nis no scalar"), ["the loss is no scalar"]),
    ],
)
def test_whatever_is_raised_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, words: list
) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(api, "open_store", fail)
    done = call("info", "x.zarr")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    shown = call("info", "x.zarr", "--debug")
    assert shown.exception is error or isinstance(error, KeyboardInterrupt)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_leaves_a_store_that_resumes(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Whenever the signal comes: before, amid or after the tiles."""
    path = tmp_path / "stopped.zarr"
    command = [sys.executable, "-m", "disthess", "run", str(folder / "run.yaml"), "--store", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "resume" in said
    assert "Traceback" not in said
    again = call("run", folder / "run.yaml", "--store", path)
    assert again.exit_code == 0, again.output
    assert json.loads(call("verify", path, "--json").stdout)["whole"] is True


def test_version_and_help_teach() -> None:
    assert call("--version").stdout == f"disthess {disthess.__version__}\n"
    for verb in ("plan", "run", "info", "block", "spectrum", "lowrank", "verify"):
        done = call(verb, "--help")
        assert done.exit_code == 0
        assert f"disthess {verb}" in " ".join(done.stdout.split())


RICH = """
problem:
  factory: small.py:problem
compute:
  store: STORE
  dtype: float64
  parts: [hessian, ggn]
  activations: ["0", "1", "2"]
  activations_per_sample: true
  sections: {upper: "0.weight[0:2]", rest: "0.weight[2:]"}
report: {eigenvalues: 0, blocks: 0, density: false, pictures: false}
"""


@pytest.fixture(scope="module")
def rich(folder: Path) -> Path:
    (folder / "rich.yaml").write_text(RICH.replace("STORE", str(folder / "rich.zarr")))
    done = call("run", folder / "rich.yaml")
    assert done.exit_code == 0, done.output
    assert "certificate activations: passed" in done.output
    assert "ggn        positive semi-definite" in done.output
    return folder / "rich.zarr"


def test_info_names_activations_uses_and_sections(rich: Path) -> None:
    tree = json.loads(call("info", rich, "--json").stdout)
    assert [entry["name"] for entry in tree["activations"]] == ["0", "1", "2"]
    assert tree["sections"]["upper"] == "0.weight[0:2]"
    assert "0.weight@0" in tree["uses"]
    shown = call("info", rich).output
    assert "activations: 0, 1, 2" in shown
    assert "section upper = 0.weight[0:2]" in shown


@pytest.mark.parametrize("of", ["parameters", "activations", "sections"])
def test_info_pairs_as_table_csv_json_and_picture(rich: Path, of: str, tmp_path: Path) -> None:
    done = call("info", rich, "--pairs", "--of", of, "--metric", "coupling", "--top", 3, "--csv", tmp_path / "p.csv",
                "--plot", tmp_path / "p.png")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"pairs of {of}, hessian, by coupling" in done.output
    assert (tmp_path / "p.png").stat().st_size > 1000
    rows = json.loads(call("info", rich, "--pairs", "--of", of, "--json").stdout)
    table = api.open_store(rich).pairs(of=of)
    assert [row["norm"] for row in rows] == [row.norm for row in table.rows]
    assert (tmp_path / "p.csv").read_text() == table.to_csv()


def test_activations_are_listed_shown_and_saved(rich: Path, store: Path, tmp_path: Path) -> None:
    assert "sample by sample, 20" in call("activations", rich).output
    done = call("activations", rich, "0", "2", "--per-sample", "--out", tmp_path / "b.npy")
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "b.npy").shape == (20, 4, 2)
    assert "20 samples of shape 4 x 2" in done.output
    assert "shape 4 x 2" in call("activations", rich, "0", "2").output
    refused = call("activations", store)
    assert refused.exit_code != 0


def test_block_of_uses_and_of_sections(rich: Path, tmp_path: Path) -> None:
    done = call("block", rich, "0.weight@0", "2.bias@2", "--use", "--out", tmp_path / "u.npy")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load(tmp_path / "u.npy"), api.open_store(rich).block("0.weight", "2.bias"))
    assert "shape 6 x 2" in call("block", rich, "upper", "2.bias").output


def test_curvature_adds_up(folder: Path, rich: Path, tmp_path: Path) -> None:
    done = call("curvature", folder / "rich.yaml", "--plot", tmp_path / "c.png")
    assert done.exit_code == 0, done.output
    assert "nodes that make up the residual" in done.output
    assert (tmp_path / "c.png").stat().st_size > 1000
    tree = json.loads(call("curvature", folder / "rich.yaml", "--json").stdout)
    assert sum(node["share"] for node in tree["nodes"]) == pytest.approx(1.0)
    assert tree["norm"] == pytest.approx(np.linalg.norm(api.open_store(rich).dense("residual")))
