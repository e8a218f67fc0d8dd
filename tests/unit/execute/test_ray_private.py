"""A private Ray in a process of its own: nothing is left behind, and SIGTERM to the process stops it in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_DRIVER = """
import os, pathlib, signal, sys
import toy_job
from disthess.execute.ray_executor import RayExecutor
from disthess.execute.signals import stop_on_signals
import ray

folder = pathlib.Path(sys.argv[1])
(folder / "driver").write_text(str(os.getpid()))
environment, recorder = dict(os.environ), toy_job.Recorder()
with stop_on_signals() as stop:
    handler = signal.getsignal(signal.SIGTERM)
    outcome = RayExecutor(2).run(toy_job.ToyJob(folder, {1: "signal", 0: "slow"}), toy_job.make_tiles(8, 2), recorder, stop)
    assert signal.getsignal(signal.SIGTERM) is handler
assert dict(os.environ) == environment
assert not ray.is_initialized()
print(outcome.stopped, outcome.finished == len(recorder.done), 1 in recorder.done, len(recorder.done) < 8)
"""


@pytest.mark.slow
def test_a_private_ray_leaves_nothing_behind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    folder = tmp_path / "work"
    folder.mkdir()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", str(Path(__file__).parents[3]))])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, str(folder)],
        env={**environment, "HOME": str(home), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "True True True True\n"


_LISTENER = """
import ipaddress
import psutil
from disthess.execute.ray_session import ray_session
import ray
from ray._private import ray_constants

found = set()
with ray_session(None, 1, 0):
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        found |= {(process.name(), c.laddr.ip) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
assert ray_constants.ENABLE_RAY_CLUSTER
assert {name for name, _ in found} >= {"gcs_server", "raylet"}, found
places = {ipaddress.ip_address(ip.removeprefix("::ffff:")) for _, ip in found}
assert all(place.is_loopback for place in places), found
print("loopback")
"""


def test_a_private_ray_listens_on_loopback_alone() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.environ.get("PYTHONPATH", str(Path(__file__).parents[3]))
    done = subprocess.run(
        [sys.executable, "-c", _LISTENER],
        env={**environment, "PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout == "loopback\n", done.stderr[-3000:]


def test_token_authentication_is_never_switched_off() -> None:
    # Its mode is read in places, and named in messages; nobody sets it.
    setting = re.compile(r"""RAY_AUTH_MODE["']\s*(\]\s*=[^=]|:|,)|RAY_AUTH_MODE\s*=[^=]""")
    assert setting.search('os.environ["RAY_AUTH_MODE"] = "disabled"')
    assert setting.search('{"RAY_AUTH_MODE": "disabled"}')
    sources = (Path(__file__).parents[3] / "disthess").rglob("*.py")
    assert [path for path in sources if setting.search(path.read_text())] == []
