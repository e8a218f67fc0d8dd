"""Runs as Ray jobs: what is refused before a cluster is asked, and, on a head of the tests' own, from submit to stop."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from heads import ROOT, Head, free_ports, outside_environment, ray_head
from typer.testing import CliRunner, Result

import disthess
from disthess.cli import jobs
from disthess.cli.main import app
from disthess.errors import ConfigError, DisthessError
from disthess.execute.job import JobRequest, JobState, check_address, explain_failure

# Every command is a process that loads torch and ray: minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)

FACTORY = """
import torch
import disthess

def problem(layers=0, width=4, samples=20, fault=""):
    if fault:
        raise ValueError(fault)
    torch.manual_seed(0)
    inner = [layer for _ in range(layers) for layer in (torch.nn.Linear(width, width), torch.nn.Tanh())]
    net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), *inner, torch.nn.Linear(width, 2))
    batches = [(torch.randn(samples, 3), torch.randint(0, 2, (samples,)))]
    return disthess.Problem(net, loss="cross_entropy", batches=batches)
"""
TILES = 44
"""Of the problem that is stopped: one for each parameter of twenty-two layers."""
CONFIG = """
problem: {factory: small.py:problem, arguments: ARGUMENTS}
compute: {store: STORE, dtype: float64, method: METHOD, workers: 1, threads: 1}
report: {eigenvalues: 3, blocks: 4, pictures: false}
"""


def write_run(folder: Path, arguments: str = "{}", method: str = "auto") -> Path:
    """A run file, its problem beside it, and a store that lies elsewhere."""
    folder.mkdir(exist_ok=True)
    (folder / "small.py").write_text(FACTORY)
    text = CONFIG.replace("ARGUMENTS", arguments).replace("METHOD", method).replace("STORE", "made/run.zarr")
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def refused(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def disthess_at(head: Head, folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in another process, as a user would give it."""
    verbs = 2 if arguments[0] == "job" else 1
    line = [*arguments[:verbs], *arguments[verbs:], "--address", head.dashboard]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "disthess", *line],
        cwd=folder,
        env={**head.environment, **more},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "Ray client"),
        ("head:6379", "where machines join"),
        ("head:8265", "not a web address"),
        ("auto", "on the cluster itself"),
    ],
)
def test_an_address_of_another_form_names_the_right_one(address: str, said: str, tmp_path: Path) -> None:
    done = refused("submit", write_run(tmp_path), "--working-dir", tmp_path, "--address", address)
    assert done.exit_code == 2
    assert said in done.output
    assert "http://HOST:8265" in done.output if address == "auto" else "http://head:8265" in done.output
    with pytest.raises(ConfigError):
        check_address(address)


def test_no_cluster_is_one_paragraph(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    run = ("submit", write_run(tmp_path), "--working-dir", tmp_path)
    for line in (run, ("job", "status"), ("job", "stop", "x"), ("job", "logs", "x")):
        done = refused(*line, "--address", nowhere)
        assert done.exit_code == 1, done.output
        assert f"no Ray cluster answers at {nowhere}" in done.output
        assert len(done.output.strip().splitlines()) == 1


class Other(http.server.BaseHTTPRequestHandler):
    answer = 404

    def do_GET(self) -> None:
        self.send_response(self.answer)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("code", "said"),
    [(404, "not as the dashboard"), (200, "not as the dashboard"), (401, "given no token"), (403, "it does not take")],
)
def test_something_else_and_a_refusal_are_told_apart(code: int, said: str) -> None:
    handler = type("Answer", (Other,), {"answer": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = refused("job", "status", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.exit_code == 1
    assert said in done.output


def test_what_is_not_there_is_refused_before_the_cluster_is_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    for line, said in (
        (("submit", tmp_path / "none.yaml"), "there is no run file"),
        (("submit", run, "--working-dir", tmp_path / "none"), "is no folder"),
        (("submit", run, "--working-dir", tmp_path / "other"), "does not lie in the working directory"),
        (("submit", run, "--working-dir", tmp_path, "--env", "NAME"), "KEY=VALUE"),
    ):
        done = refused(*line)
        assert done.exit_code == 2, done.output
        assert said in done.output


def test_the_job_runs_the_run_file_on_its_own_cluster() -> None:
    sent = JobRequest(config="a b.yaml", store="/s", working_dir=Path("/w"), options=("--workers", "3"), wait_seconds=7)
    assert sent.entrypoint == (
        "exec python -m disthess run 'a b.yaml' --store /s --executor ray --address auto --workers 3"
    )
    assert sent.runtime_env == {"working_dir": "/w", "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "7"}}
    seen = JobRequest(config="r.yaml", store="/s", working_dir=Path("/w x"), upload=False, variables={"A": "1"})
    assert seen.entrypoint.startswith("cd '/w x' && exec python -m disthess run r.yaml")
    assert "working_dir" not in seen.runtime_env
    assert seen.runtime_env["env_vars"]["A"] == "1"


def test_failures_say_what_to_do() -> None:
    for log in ("ModuleNotFoundError: No module named 'ray'", "python: No module named disthess"):
        assert "--python" in explain_failure(JobState("j", "FAILED", 1), log)
    assert "--python" in explain_failure(JobState("j", "FAILED", 127), "sh: 1: python: not found")
    assert "its log" in explain_failure(JobState("j", "FAILED", 2), "No module named 'my_model'")
    assert "from outside" in explain_failure(JobState("j", "FAILED", -9), "")
    assert "no room" in explain_failure(JobState("j", "FAILED", None, "no room"), "")


class Answers:
    """In place of a cluster: a job that prints a line, then ends or is interrupted."""

    address = "http://head:8265"

    def __init__(self, state: JobState | None) -> None:
        self.state = state

    def follow(self, job: str, write: Callable[[str], None]) -> JobState:
        write("a line\n")
        if self.state is None:
            raise KeyboardInterrupt
        return self.state


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        (None, 1, "disthess job stop j --address http://head:8265"),
        (JobState("j", "SUCCEEDED", 0), 0, ""),
        (JobState("j", "FAILED", 2), 2, "exit code 2"),
        (JobState("j", "FAILED", 3), 3, "exit code 3"),
        (JobState("j", "STOPPED"), 1, "to resume"),
    ],
)
def test_following_ends_as_the_job_does_and_an_interrupt_leaves_it_alone(
    state: JobState | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        jobs._follow(Answers(state), "j")  # type: ignore[arg-type]
    printed = capsys.readouterr()
    assert ended.value.exit_code == code
    assert printed.out == "a line\n"
    assert said in printed.err


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64) as found:
        yield found


def certified(path: Path) -> bool:
    store = disthess.open_store(path)
    tree = json.loads(refused("info", path, "--json").stdout)
    return store.missing_tiles() == () and tree["certificates"]["hessian"]["passed"] is True


@pytest.mark.slow
def test_a_job_ends_in_a_whole_store_and_its_own_exit_code(head: Head, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    done = disthess_at(head, tmp_path / "run", "submit", "run.yaml", "--submission-id", "first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "certificate hessian: passed" in done.stdout
    assert "computing" in done.stdout
    assert "\x1b" not in done.stdout, "lines, no bars"
    assert certified(tmp_path / "run" / "made" / "run.zarr")
    write_run(tmp_path / "run", "{unknown: 1}")
    wrong = disthess_at(head, tmp_path / "run", "submit", "run.yaml")
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    write_run(tmp_path / "run", "{fault: no data today}")
    failed = disthess_at(head, tmp_path / "run", "submit", "run.yaml")
    assert failed.returncode == 1
    assert "no data today" in failed.stdout
    assert "failed with exit code 1" in failed.stderr
    taken = disthess_at(head, tmp_path / "run", "submit", "run.yaml", "--submission-id", "first")
    assert taken.returncode == 2, taken.stdout + taken.stderr
    assert "is taken" in taken.stderr
    listed = disthess_at(head, tmp_path, "job", "status")
    assert "job first: SUCCEEDED" in listed.stdout
    assert "FAILED (exit code 2)" in listed.stdout
    assert "knows no job" in disthess_at(head, tmp_path, "job", "status", "nobody").stderr


def tiles_left(path: Path) -> int | None:
    """None before the store is there, whole."""
    with contextlib.suppress(DisthessError, OSError, KeyError):
        return len(disthess.open_store(path).missing_tiles())
    return None


@pytest.mark.slow
def test_stop_finishes_tiles_in_flight_and_submitting_again_resumes(head: Head, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, "{layers: 20, width: 8, samples: 600}", "autograd")
    sent = disthess_at(head, folder, "submit", "run.yaml", "--no-follow", "--no-upload")
    assert sent.returncode == 0, sent.stderr
    name, store = sent.stdout.strip(), folder / "made" / "run.zarr"
    given = {"RAY_AUTH_TOKEN": head.environment["RAY_AUTH_TOKEN"], "RAY_AUTH_MODE": None}
    asked = CliRunner().invoke(app, ["job", "status", name, "--address", head.dashboard], env=given)
    assert asked.exit_code == 0, asked.output
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and tiles_left(store) in (None, TILES):
        time.sleep(0.05)
    # Here and not in another process, whose start would take longer than the tiles that are left.
    stopped = CliRunner().invoke(app, ["job", "stop", name, "--address", head.dashboard], env=given)
    assert stopped.exit_code == 0, stopped.output
    assert "STOPPED" in stopped.output
    log = disthess_at(head, folder, "job", "logs", name).stdout
    assert "The tiles in flight were finished" in log, log
    left = tiles_left(store)
    assert left is not None
    assert 0 < left < TILES
    assert f"{left} of {TILES} tiles left" in log
    assert "had ended before" in disthess_at(head, folder, "job", "stop", name).stdout
    again = disthess_at(head, folder, "submit", "run.yaml", "--no-upload", "--workers", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"computing {left} tiles" in again.stdout
    assert certified(store)


@pytest.mark.slow
def test_tokens_and_interpreters_are_explained(head: Head, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for token, said in (("b" * 64, "it does not take"), ("", "given no token")):
        done = disthess_at(
            head,
            tmp_path / "run",
            "submit",
            "run.yaml",
            RAY_AUTH_TOKEN=token,
            HOME=str(tmp_path),
            RAY_AUTH_MODE="token",
        )
        assert done.returncode == 1
        assert said in done.stderr, done.stderr
    quiet = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_MODE"}
    found = disthess_at(Head(head.port, head.dashboard, quiet, head.folder), tmp_path, "job", "status")
    assert found.returncode == 0, "a token at hand is used without being told to"
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for python in (str(bare), "/nowhere/python"):
        done = disthess_at(head, tmp_path / "run", "submit", "run.yaml", "--python", python)
        assert done.returncode == 1, done.stdout
        assert "--python /path/to/bin/python" in done.stderr, done.stdout + done.stderr


@pytest.mark.slow
def test_a_working_directory_too_large_is_refused(head: Head, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "data.bin").write_bytes(os.urandom(110 << 20))
    done = disthess_at(head, tmp_path / "run", "submit", "run.yaml")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "too large" in done.stderr


def test_outside_the_cluster_nothing_of_the_tests_is_left() -> None:
    assert "RAY_ADDRESS" not in outside_environment()
    assert (ROOT / "cluster" / "local" / "head.sh").stat().st_mode & 0o111
