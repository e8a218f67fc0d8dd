"""Runs as jobs of a Ray cluster: submitted, followed, asked after and stopped through the address of its dashboard.

1. The working directory is sent to the cluster as Ray does it, or is one that the cluster's machines see themselves.
2. There the job runs ``disthess run`` with the cluster it finds itself on, and Ray keeps what it prints.
3. The log is read again and again and what is new in it passed on: slower than a socket held open, but it survives
   proxies and lost connections. The larger the log, the rarer.

Stopping is SIGTERM to the job: the run finishes its tiles in flight, and resumes when submitted again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from disthess.errors import ConfigError, ExecutionError
from disthess.execute.job import JobRequest, JobState, check_address

_CONNECT_SECONDS = 10.0
_LOST_SECONDS = 60.0
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_LOG_BYTES_PER_SECOND = 200_000
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class LostClusterError(ExecutionError):
    """The cluster did not answer; asking again later may help."""


@final
class JobClient:
    """The jobs of one cluster.

    Args:
        address: Of its dashboard, such as ``http://head:8265``.

    Raises:
        ConfigError: The address is of another form.
        ExecutionError: Nothing, or something else, answers there; or it wants a token.
    """

    def __init__(self, address: str) -> None:
        self._address = check_address(address)
        _check_reachable(self._address)
        try:
            with _quiet(), _only(self._address):
                self._client = JobSubmissionClient(self._address, headers=_token_headers())
        except AuthenticationError as error:
            raise self._refused(error) from error
        # Ray raises what requests, JSON or a missing key raise, according to what the other end is.
        except Exception as error:
            raise ExecutionError(
                f"something answers at {self._address}, but not as the dashboard of a Ray cluster does ({_first(error)}). Give "
                "the address that 'ray start --head' named as the dashboard's, by default port 8265 (6379 is where machines "
                "join, 10001 the Ray client's)."
            ) from error

    @property
    def address(self) -> str:
        """Of the dashboard."""
        return self._address

    def submit(self, request: JobRequest) -> str:
        """Submit a job; its submission id.

        Raises:
            ConfigError: The working directory is too large, or the submission id taken.
            ExecutionError: The cluster refused.
        """
        try:
            with self._asking():
                return str(
                    self._client.submit_job(
                        entrypoint=request.entrypoint,
                        runtime_env=request.runtime_env,
                        metadata={"disthess_store": request.store},
                        submission_id=request.submission_id,
                    )
                )
        except RuntimeError as error:
            raise self._submit_error(request, error) from error

    def state(self, job: str) -> JobState:
        """How a job is.

        Raises:
            ExecutionError: There is no such job, or the cluster does not answer.
        """
        try:
            with self._asking():
                return _state_of(self._client.get_job_info(job))
        except RuntimeError as error:
            raise self._job_error(job, error) from error

    def states(self) -> tuple[JobState, ...]:
        """All submitted jobs that the cluster remembers, the latest first.

        Raises:
            ExecutionError: The cluster does not answer.
        """
        with self._asking():
            found = [_state_of(details) for details in self._client.list_jobs() if details.submission_id]
        return tuple(sorted(found, key=lambda state: -(state.start or 0.0)))

    def log(self, job: str) -> str:
        """All that a job has printed so far.

        Raises:
            ExecutionError: There is no such job, or the cluster does not answer.
        """
        try:
            with self._asking():
                return str(self._client.get_job_logs(job) or "")
        except RuntimeError as error:
            raise self._job_error(job, error) from error

    def follow(self, job: str, write: Callable[[str], None] = lambda text: None) -> JobState:
        """Pass on what a job prints until it ends.

        Args:
            job: Its submission id.
            write: Called with what is new.

        Returns:
            How it ended.

        Raises:
            ExecutionError: The cluster has not answered for a minute. The job may go on.
        """
        shown, answered = 0, time.monotonic()
        while True:
            try:
                # In this order: a log read after the end is the whole one.
                state, log = self.state(job), self.log(job)
                answered = time.monotonic()
            except LostClusterError:
                if time.monotonic() - answered > _LOST_SECONDS:
                    raise
                time.sleep(_SHORTEST_PAUSE_SECONDS)
                continue
            if len(log) > shown:
                write(log[shown:])
                shown = len(log)
            if state.ended:
                return state
            time.sleep(min(max(_SHORTEST_PAUSE_SECONDS, shown / _LOG_BYTES_PER_SECOND), _LONGEST_PAUSE_SECONDS))

    def stop(self, job: str) -> bool:
        """Ask a job to finish its tiles in flight and end; False if it had ended before.

        Raises:
            ExecutionError: There is no such job, or the cluster does not answer.
        """
        if self.state(job).ended:
            return False
        try:
            with self._asking():
                return bool(self._client.stop_job(job))
        except RuntimeError as error:
            raise self._job_error(job, error) from error

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except AuthenticationError as error:
            raise self._refused(error) from error
        except OSError as error:
            raise LostClusterError(
                f"the cluster at {self._address} no longer answers ({_first(error)}). A job that runs there may go on; ask "
                "again once the head can be reached."
            ) from error

    def _refused(self, error: Exception) -> ExecutionError:
        given = "a token it does not take" if "invalid" in str(error).lower() else "no token, and it wants one"
        return ExecutionError(
            f"the Ray cluster at {self._address} was given {given}. Set RAY_AUTH_TOKEN to the cluster's token, or keep it "
            "in ~/.ray/auth_token or in a file named by RAY_AUTH_TOKEN_PATH; RAY_AUTH_MODE must not be 'disabled'. On the "
            "head, 'ray get-auth-token' prints it."
        )

    def _submit_error(self, request: JobRequest, error: RuntimeError) -> Exception:
        said = str(error)
        if re.search(r"status code 413|TooLarge|Too Large|exceeds the maximum size", said):
            return ConfigError(
                f"the working directory {request.working_dir} is too large to be sent to {self._address}, which takes at "
                "most 100 MiB. Name what is not needed in .gitignore or .rayignore, give a smaller --working-dir, or, where "
                "the cluster's machines see the same files, --no-upload."
            )
        if "already exists" in said:
            return ConfigError(
                f"--submission-id {request.submission_id} is taken by an earlier job of {self._address}. Choose another, or "
                "leave it out; the store, not the id, is what a run resumes from."
            )
        return ExecutionError(
            f"the cluster at {self._address} did not take the job: {_last_line(said)}. Look at the logs of the head."
        )

    def _job_error(self, job: str, error: RuntimeError) -> ExecutionError:
        if "does not exist" in str(error):
            return ExecutionError(
                f"the cluster at {self._address} knows no job {job}. 'disthess job status --address {self._address}' lists "
                "those it knows; a cluster that was started again has forgotten the earlier ones."
            )
        # The head answers, but not the machine or process that keeps the log: it may be back in a moment.
        return LostClusterError(
            f"the cluster at {self._address} did not answer about job {job}: {_last_line(str(error))}."
        )


def _state_of(details: Any) -> JobState:
    return JobState(
        job=str(details.submission_id or details.job_id),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        entrypoint=details.entrypoint,
        store=(details.metadata or {}).get("disthess_store", ""),
        start=None if details.start_time is None else details.start_time / 1000,
        end=details.end_time / 1000 if details.end_time else None,
    )


def _check_reachable(address: str) -> None:
    """Whether anything listens, soon: Ray's client itself would wait for minutes where packets are dropped."""
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ExecutionError(
            f"no Ray cluster answers at {address} ({_first(error)}). Start a head ('ray start --head', or "
            "cluster/local/head.sh), or give --address the dashboard of one that runs; from outside its network, forward the "
            "port first (ssh -L 8265:localhost:8265 HEAD, or kubectl port-forward)."
        ) from error


def _token_headers() -> dict[str, str] | None:
    """The token, where one is at hand and nobody has said whether to use it: as Ray's own programs do."""
    if "RAY_AUTH_MODE" in os.environ:
        return None
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token:
        with contextlib.suppress(OSError):
            token = place.read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else None


@contextlib.contextmanager
def _only(address: str) -> Iterator[None]:
    """Let an address count: Ray prefers these variables to what it is told."""
    before = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    os.environ[_ADDRESS_VARIABLES[0]] = address
    try:
        yield
    finally:
        del os.environ[_ADDRESS_VARIABLES[0]]
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's client says at every step what it does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200].rstrip('.')}"


def _last_line(text: str) -> str:
    """The end of a traceback that came over HTTP."""
    return (text.strip().rstrip(".").splitlines() or [""])[-1][:400].rstrip(".")
