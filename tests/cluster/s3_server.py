"""An S3 server for tests, in a process of its own, and the environment that leads obstore to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BUCKET = "bucket"
KEY = "testing"
SECRET = "testing-secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(url: str, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    """Until the server answers anything at all."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"no server at {url} after {seconds} s")


@contextmanager
def moto_server() -> Iterator[str]:
    """Its URL; it has one bucket."""
    pytest.importorskip("moto")
    pytest.importorskip("obstore")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_up(url, process)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=60).close()
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def radosgw() -> Iterator[str]:
    """A real S3 server, Ceph's; see radosgw.sh for what it needs."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("obstore")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="disthess-rgw-") as folder:
        command = [str(Path(__file__).with_name("radosgw.sh")), folder, str(port), KEY, SECRET]
        log = Path(folder) / "start.log"
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            try:
                deadline = time.monotonic() + 180
                while "\nready" not in log.read_text():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"radosgw did not start:\n{log.read_text()[-3000:]}")
                    time.sleep(0.2)
                client = boto3.client(
                    "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id=KEY, aws_secret_access_key=SECRET
                )
                client.create_bucket(Bucket=BUCKET)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()
                process.wait(60)


@contextmanager
def answering(status: int, code: str) -> Iterator[tuple[str, list[str]]]:
    """A server that says the same to everybody: its URL, and what it was asked for."""
    asked: list[str] = []
    body = f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(url: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """Variables that obstore reads."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


@contextmanager
def environment_set(values: dict[str, str]) -> Iterator[None]:
    """These variables and no others of the kind, for this process and those it starts."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
