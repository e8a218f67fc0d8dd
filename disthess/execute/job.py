"""What a job of a Ray cluster is: what is asked for, how it stands, and why it failed. Nothing here talks to a cluster."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disthess.errors import ConfigError

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_OURS = {"disthess", "ray", "torch", "typer", "zarr", "dask", "numpy", "scipy", "pydantic", "yaml", "rich", "psutil"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What to submit.

    Attributes:
        config: The run file, relative to the working directory.
        store: Where the run writes, as the cluster's machines name it.
        working_dir: A directory of this machine.
        upload: Whether to send the working directory; else the cluster's machines must have it under the same path.
        options: Further options of ``disthess run``.
        python: The interpreter to call on the cluster's head.
        variables: Environment of the job and its workers.
        wait_seconds: How long a stopped job may take to finish its tiles in flight.
        submission_id: Ray's if None.
    """

    config: str
    store: str
    working_dir: Path
    upload: bool = True
    options: tuple[str, ...] = ()
    python: str = "python"
    variables: Mapping[str, str] = field(default_factory=dict)
    wait_seconds: int = 300
    submission_id: str | None = None

    @property
    def entrypoint(self) -> str:
        """The command of the job; ``exec``, so that its signals reach Python and no shell between.

        >>> JobRequest(config="run.yaml", store="/s.zarr", working_dir=Path("/work")).entrypoint
        'exec python -m disthess run run.yaml --store /s.zarr --executor ray --address auto'
        """
        command = [self.python, "-m", "disthess", "run", self.config, "--store", self.store]
        run = shlex.join([*command, "--executor", "ray", "--address", "auto", *self.options])
        return f"exec {run}" if self.upload else f"cd {shlex.quote(str(self.working_dir))} && exec {run}"

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment of the job, which its workers inherit."""
        variables = {STOP_WAIT_VARIABLE: str(self.wait_seconds), **self.variables}
        if self.upload:
            return {"working_dir": str(self.working_dir), "env_vars": variables}
        variables.setdefault("PYTHONPATH", f"{self.working_dir}{os.pathsep}${{PYTHONPATH}}")
        return {"env_vars": variables}


@dataclass(frozen=True, slots=True)
class JobState:
    """How a job is.

    Attributes:
        job: Its submission id.
        status: Ray's word: ``PENDING``, ``RUNNING``, ``STOPPED``, ``SUCCEEDED`` or ``FAILED``.
        exit_code: Of its process, where it ended by itself.
        message: Ray's message.
        entrypoint: Its command.
        store: What it writes; empty for a job that is not ours.
        start: Unix time in seconds, or None.
        end: Unix time in seconds, or None.
    """

    job: str
    status: str
    exit_code: int | None = None
    message: str = ""
    entrypoint: str = ""
    store: str = ""
    start: float | None = None
    end: float | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def outcome(self) -> int:
        """Exit code for whoever waited: the job's own where it is one of ours, else 1.

        >>> JobState("a", "FAILED", 2).outcome, JobState("a", "FAILED", 137).outcome, JobState("a", "STOPPED").outcome
        (2, 1, 1)
        """
        if self.status == "SUCCEEDED":
            return 0
        return self.exit_code if self.exit_code in (1, 2, 3) and self.status == "FAILED" else 1


def check_address(address: str) -> str:
    """The address of a dashboard, without a slash at its end.

    Raises:
        ConfigError: It is of another form; the message says which one was meant.

    >>> check_address("http://head:8265/")
    'http://head:8265'
    """
    scheme, separator, rest = address.rpartition("://")
    host = re.split(r"[:/]", rest)[0] or "HOST"
    if separator and scheme in ("http", "https") and host != "HOST":
        return address.rstrip("/")
    if scheme == "ray":
        kind = "the address of a Ray client"
    elif address == "auto":
        kind, host = "what a program on the cluster itself gives", "HOST"
    elif rest.endswith(":6379"):
        kind = "the address where machines join the cluster"
    else:
        kind = "not a web address"
    raise ConfigError(
        f"--address {address} is {kind}. Jobs are submitted to the dashboard of the cluster's head: give "
        f"--address http://{host}:8265, with the port that 'ray start --head' named as the dashboard's."
    )


def explain_failure(state: JobState, log: str) -> str:
    """Why a job failed, where the reason is in how it was started; else that its log has the reason.

    >>> explain_failure(JobState("j", "FAILED", 1), "/usr/bin/python: No module named disthess")[:58]
    'job j was started with an interpreter of the head that has'
    """
    missing = re.search(r"No module named '?(\w+)", log)
    wrong_python = missing is not None and missing[1] in _OURS
    if wrong_python or state.exit_code in (126, 127):
        lacks = f"that has no {missing[1]}" if wrong_python and missing else "that is not there"
        return (
            f"job {state.job} was started with an interpreter of the head {lacks}. Start the head with the bin folder of "
            "disthess's environment first on its PATH, or name that environment's interpreter: --python /path/to/bin/python."
        )
    if state.exit_code is None:
        said = " ".join(state.message.split())[:600] or "Ray gives no reason"
        return f"job {state.job} did not run to its end: {said}. What was finished is kept; submit again to resume."
    if state.exit_code in (1, 2, 3):
        return f"job {state.job} failed with exit code {state.exit_code}; its log, above, says why."
    return (
        f"job {state.job} was ended from outside (exit code {state.exit_code}), perhaps because the head ran out of memory. "
        "What was finished is kept; submit again to resume."
    )
