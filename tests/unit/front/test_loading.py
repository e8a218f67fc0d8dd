"""Factories and checkpoints: found, called, checked; errors say what to do."""

from __future__ import annotations

import os
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import disthess
from disthess.errors import ConfigError, ProblemError
from disthess.loading import Checkpoint, Source, load_checkpoint, load_problem

FACTORY = """
from __future__ import annotations
import dataclasses
import torch
import disthess
from sibling import WIDTH

@dataclasses.dataclass
class Options:
    width: int = WIDTH

class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = torch.nn.Linear(width, 1)
    def forward(self, x):
        return self.fc(x)

def objective(model, batch):
    return (model(batch) ** 2).sum()

def problem(width: int = Options().width) -> disthess.Problem:
    return disthess.Problem(Net(width), objective=objective, batches=[torch.ones(3, width)])

def broken():
    raise ValueError("no data on this machine\\nsecond line")

def other():
    return 7

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made_here.py").write_text(FACTORY)
    (tmp_path / "sibling.py").write_text("WIDTH = 4\n")
    (tmp_path / "fails.py").write_text("import there_is_no_such_module_at_all\n")
    yield tmp_path
    for name in ("made_here", "sibling", "fails"):
        sys.modules.pop(name, None)


def source(folder: Path, factory: str, **arguments: object) -> Source:
    return Source(factory, arguments, folders=(str(folder),))


@pytest.mark.parametrize("place", ["made_here.py", "made_here"])
def test_a_factory_is_found_as_file_and_as_module(folder: Path, place: str) -> None:
    before = list(sys.path)
    assert load_problem(source(folder, f"{place}:problem")).numel == 5
    assert load_problem(source(folder, f"{place}:problem", width=2)).numel == 3
    assert sys.path == before


def test_an_absolute_file_is_found_from_anywhere(folder: Path) -> None:
    assert load_problem(Source(f"{folder}/made_here.py:problem")).numel == 5


@pytest.mark.parametrize(
    ("factory", "arguments", "words"),
    [
        ("made_here.py", {}, ["package.module:function"]),
        ("made_here:", {}, ["package.module:function"]),
        ("absent.py:problem", {}, ["absent.py", "does not exist"]),
        ("absent_module.part:problem", {}, ["absent_module", "no module"]),
        ("fails:problem", {}, ["could not be imported", "there_is_no_such_module_at_all"]),
        ("fails.py:problem", {}, ["could not be imported", "there_is_no_such_module_at_all"]),
        ("made_here.py:problm", {}, ["problm", "Did you mean problem"]),
        ("made_here.py:number", {}, ["int", "function is expected"]),
        ("made_here.py:other", {}, ["returned int", "disthess.Problem"]),
        ("made_here.py:problem", {"wdth": 3}, ["wdth", "signature"]),
    ],
)
def test_a_wrong_factory_is_a_config_error(folder: Path, factory: str, arguments: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_problem(source(folder, factory, **arguments))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_inside_the_factory_is_the_problems(folder: Path) -> None:
    with pytest.raises(ProblemError, match="broken raised ValueError: no data on this machine") as caught:
        load_problem(source(folder, "made_here.py:broken"))
    assert caught.value.exit_code == 1


def test_what_a_file_defines_can_be_unpickled_where_the_file_is_not(folder: Path) -> None:
    """Ray workers get the problem by cloudpickle and know nothing of the file."""
    import ray.cloudpickle

    problem = load_problem(source(folder, "made_here.py:problem"))
    (folder / "problem.pkl").write_bytes(ray.cloudpickle.dumps((problem.model, problem.recipe)))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    script = "import pickle, torch; m, r = pickle.load(open('../problem.pkl', 'rb')); print(r.evaluate(m, torch.ones(3, 4)).ndim)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.stdout.strip() == "0", done.stderr


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_checkpoint_is_copied_into_the_model(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    there, here = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {f"net.{name}": tensor for name, tensor in there.state_dict().items()} | {"epoch": torch.tensor(3)}
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(state, path)
        load_checkpoint(here, Checkpoint(str(path), "safetensors", prefix="net."))
    else:
        torch.save({"state": state, "step": 3}, path)
        load_checkpoint(here, Checkpoint(str(path), "torch", prefix="net.", key="state"))
    assert torch.equal(here.weight, there.weight)
    assert torch.equal(here.bias, there.bias)


def test_one_name_of_a_tied_tensor_suffices(tmp_path: Path) -> None:
    model = Tied()
    save_file({"first.weight": torch.eye(3), "second.bias": torch.ones(3)}, tmp_path / "tied")
    load_checkpoint(model, Checkpoint(str(tmp_path / "tied"), "safetensors"))
    assert torch.equal(model.second.weight, torch.eye(3))
    assert model.second.weight is model.first.weight


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight": torch.ones(2, 3)}, ["1 missing (bias)", "none unexpected"]),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "scale": torch.ones(1)},
            ["none missing", "1 unexpected (scale)"],
        ),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, ["weight has [2, 4], the model [2, 3]"]),
    ],
)
def test_a_checkpoint_that_does_not_match_changes_nothing(tmp_path: Path, state: dict, words: list[str]) -> None:
    model = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "weights")
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(model, Checkpoint(str(tmp_path / "weights"), "safetensors"))
    for word in words:
        assert word in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = path


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"weight": Bomb(tmp_path / "crater")}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="could not be read as torch"):
        load_checkpoint(nn.Linear(3, 2), Checkpoint(str(tmp_path / "weights.pt"), "torch"))
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, format: str) -> None:
    (tmp_path / "weights").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(ConfigError, match=rf"could not be read as {format}|holds list"):
        load_checkpoint(nn.Linear(3, 2), Checkpoint(str(tmp_path / "weights"), format))
    with pytest.raises(ConfigError, match="checkpoint absent does not exist"):
        load_checkpoint(nn.Linear(3, 2), Checkpoint("absent", format))


def test_public_names_are_found_and_others_are_not() -> None:
    assert disthess.Problem.__name__ == "Problem"
    with pytest.raises(AttributeError, match="public names are"):
        disthess.Probelm  # noqa: B018


def test_no_public_name_is_also_a_module() -> None:
    """Loading such a module would put it in the place of the function."""
    modules = {module.name for module in pkgutil.iter_modules(disthess.__path__)}
    assert modules.isdisjoint(disthess.__all__)
