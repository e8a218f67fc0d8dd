"""A Ray head of the tests' own: started by the script that users start theirs with, on free ports, ended by SIGTERM to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
START_SECONDS = 150


@dataclass(frozen=True)
class Head:
    """Where it is, and the environment of programs that talk to it."""

    port: int
    dashboard: str
    environment: dict[str, str]
    folder: Path


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


def outside_environment(**more: str) -> dict[str, str]:
    """This one without what Ray reads, with this checkout importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DISTHESS_BIN": str(BIN), **more}


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; SIGTERM at the end, and SIGKILL to its session if that is not enough."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"the head did not start:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def ray_head(*, cpus: int = 2, **variables: str) -> Iterator[Head]:
    """A head with a dashboard; without tokens unless the variables say so."""
    folder = Path(tempfile.mkdtemp(prefix="dh", dir="/tmp"))  # short: sockets lie in it
    names = (
        *("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
        *("ray-client-server-port", "metrics-export-port", "node-manager-port", "object-manager-port"),
    )
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = outside_environment(**{"RAY_AUTH_MODE": "disabled", **variables})
    command = [
        str(ROOT / "cluster" / "local" / "head.sh"),
        *(f"--{name}={port}" for name, port in ports.items()),
        *(f"--temp-dir={folder}", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1"),
        "--object-store-memory=100000000",
    ]
    log = folder.with_suffix(".log")
    try:
        with started(command, environment, log) as process:
            wait_for(ports["dashboard-port"], process, log)
            yield Head(ports["port"], f"http://127.0.0.1:{ports['dashboard-port']}", environment, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
