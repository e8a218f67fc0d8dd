"""Workers and drivers killed at random: the store ends with the bytes of an undisturbed run, and little work is done twice."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from disthess.store.layout import Tile
from disthess.store.store import Store

FACTORY = """
import torch
import disthess

def problem():
    torch.manual_seed(0)
    layers = []
    for _ in range(30):
        layers += [torch.nn.Linear(16, 16, bias=False), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 3, bias=False))
    return disthess.Problem(model, loss="cross_entropy", batches=[(torch.randn(900, 16), torch.randint(0, 3, (900,)))])
"""
CONFIG = """
problem: {factory: deep.py:problem}
compute: {store: STORE, dtype: float64, executor: ray, workers: 2, threads: 1}
report: {eigenvalues: 0, blocks: 0, density: false, pictures: false}
"""
WORKERS = 2
KILLS = 8
ROOT = str(Path(__file__).parents[2])
# Workers, raylet and Ray's other processes notice within seconds that their driver is gone (4 s on an idle machine).
ORPHAN_SECONDS = 30
# Its two agents hold nothing of the run, but first try for 60 s to report the dead raylet to a server that is dead too.
AGENT_SECONDS = 90


def write_run(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "deep.py").write_text(FACTORY)
    (folder / f"{name}.yaml").write_text(CONFIG.replace("STORE", str(folder / f"{name}.zarr")))
    return folder / f"{name}.yaml"


def start(config: Path, *options: str) -> subprocess.Popen[str]:
    log = config.with_suffix(".log").open("a")
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "disthess", "run", str(config), *options]
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=config.parent, env=environment)


def array_bytes(path: Path) -> dict[str, bytes]:
    found = {}
    for kind in ("panels", "gradient", "loss"):
        for file in sorted((path / kind).rglob("*")):
            if file.is_file():
                found[str(file.relative_to(path))] = file.read_bytes()
    return found


def touched_since(store: Store, tile: Tile, clock: float) -> bool:
    """Whether a chunk of a tile has been written after a moment."""
    panels = store.layout.panels_of(tile.source)
    folders = [Path(store.path) / panel.path(part) / "c" for panel in panels for part in store.layout.parts]
    row = tile.span.start // panels[0].row_chunk
    files = [file for folder in folders for file in (folder / str(row)).glob("*")]
    return any(file.stat().st_mtime > clock for file in files)


def is_agent(process: psutil.Process) -> bool:
    """Whether it is one of Ray's two agents; judged by name, whose end the kernel cuts off."""
    try:
        return "Agent" in process.name()
    except psutil.Error:
        return False


@dataclass
class Killer:
    """Disturbs runs of one store until it has killed often enough; then leaves them alone."""

    config: Path
    random: random.Random
    kills: list[str] = field(default_factory=list)
    agents: list[psutil.Process] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.config.with_suffix(".zarr")

    def done(self) -> int:
        try:
            return int(Store.open(self.path).done().sum())
        except Exception:
            # The ledger is being made, or a chunk of it replaced at this moment.
            return -1

    def run_once(self) -> int:
        """One run of the command line, disturbed; its exit code."""
        begin = time.time()
        child = start(self.config)
        actor_kills, last = 0, self.done()
        killed = None
        while child.poll() is None:
            wanted = max(last, 0) + self.random.randint(1, 3)
            if len(self.kills) >= KILLS or not self._reach(child, wanted):
                break
            last = self.done()
            time.sleep(self.random.uniform(0.0, 1.0))
            what = self.random.choice(["actor", "actor", "SIGKILL", "SIGTERM"])
            if what == "actor":
                actor_kills += self._kill_actor(child)
                continue
            family = psutil.Process(child.pid).children(recursive=True)
            self.kills.append(what)
            killed = getattr(signal, what)
            child.send_signal(killed)
            break
        code = child.wait(timeout=240)
        if killed is not None:
            self._check_lost(begin, actor_kills, killed)
            self._check_orphans(family)
        return code

    def _reach(self, child: subprocess.Popen[str], wanted: int) -> bool:
        deadline = time.monotonic() + 150
        while child.poll() is None and time.monotonic() < deadline:
            if self.done() >= wanted:
                return True
            time.sleep(0.05)
        return False

    def _kill_actor(self, child: subprocess.Popen[str]) -> int:
        try:
            family = psutil.Process(child.pid).children(recursive=True)
            actors = [process for process in family if "ray::TileActor" in " ".join(process.cmdline())]
            if not actors:
                return 0
            self.random.choice(actors).kill()
        except psutil.Error:
            return 0
        self.kills.append("actor")
        return 1

    def _check_lost(self, begin: float, actor_kills: int, killed: signal.Signals) -> None:
        """Tiles that this run wrote to and the ledger does not know are all that is lost: one per worker and kill."""
        store = Store.open(self.path)
        done = store.done()
        lost = [t.index for t in store.layout.tiles if not done[t.index] and touched_since(store, t, begin)]
        allowed = actor_kills + (WORKERS if killed == signal.SIGKILL else 0)
        assert len(lost) <= allowed, (lost, allowed, self.kills)

    def _check_orphans(self, family: list[psutil.Process]) -> None:
        agents = [process for process in family if is_agent(process)]
        self.agents += agents
        self._expect_gone([process for process in family if process not in agents], ORPHAN_SECONDS)

    def expect_no_agents(self) -> None:
        """Of all runs that were disturbed."""
        self._expect_gone(self.agents, AGENT_SECONDS)

    def _expect_gone(self, processes: list[psutil.Process], seconds: float) -> None:
        alive = psutil.wait_procs(processes, timeout=seconds)[1]
        names = [process.name() for process in alive if process.is_running()]
        for process in alive:
            process.kill()
        assert not names, f"{names} outlived their driver, after {self.kills}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    config = write_run(tmp_path_factory.mktemp("whole"), "whole")
    child = start(config, "--executor", "serial", "--workers", "1")
    assert child.wait(timeout=280) == 0, config.with_suffix(".log").read_text()[-2000:]
    return array_bytes(config.with_suffix(".zarr"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_random_the_store_has_the_same_bytes(
    seed: int, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """Eight kills for each of three seeds: of actors by SIGKILL, of drivers by SIGKILL or SIGTERM."""
    killer = Killer(write_run(tmp_path, "killed"), random.Random(seed))
    codes: list[int] = []
    while len(killer.kills) < KILLS or codes[-1] != 0:
        assert len(codes) < 20, (codes, killer.kills)
        if codes and codes[-1] == 0:
            # A fast machine was through before the last kill: once more from nothing.
            assert array_bytes(killer.path) == undisturbed
            shutil.rmtree(killer.path)
        codes.append(killer.run_once())
    killer.expect_no_agents()
    log = killer.config.with_suffix(".log").read_text()
    assert codes[-1] == 0, log[-3000:]
    assert {-signal.SIGKILL, 0, 1} >= set(codes), codes
    assert array_bytes(killer.path) == undisturbed
    # Each killed actor costs one attempt at one tile, if it had one.
    again = re.findall(r"^tile \d+ .* failed \(will be tried again", log, flags=re.MULTILINE)
    assert len(again) <= killer.kills.count("actor"), log[-3000:]
    assert "given up" not in log
    print(seed, killer.kills, codes, f"{len(again)} attempts lost by actors")
