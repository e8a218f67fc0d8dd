"""A page in a real browser: Chromium, driven by plain WebDriver requests to its chromedriver. Nothing is downloaded."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

QUIET = [
    *("--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check"),
]


def missing() -> str:
    """Why there is no browser here; empty if there is one."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(names)} on this machine" if names else ""


class Browser:
    """One session."""

    def __init__(self, base: str, session: str) -> None:
        self._base = f"{base}/session/{session}"

    def open(self, path: Path) -> None:
        ask("POST", f"{self._base}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a function with this body returns."""
        return ask("POST", f"{self._base}/execute/sync", {"script": script, "args": []})

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return ask("POST", f"{self._base}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def look(self, width: int, *, dark: bool = False, media: str = "screen") -> None:
        """Be so wide, of that colour scheme and medium."""
        phone = width < 600
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What it logged since it was last asked: ``browser`` (the console) or ``performance`` (events, requests among them)."""
        return list(ask("POST", f"{self._base}/se/log", {"type": kind}))

    def picture(self, path: Path, top: int = 0, height: int | None = None) -> None:
        """A screenshot of the whole page, or of a band of it."""
        whole = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        clip = {"x": 0, "y": top, "width": whole[0], "height": height or whole[1] - top, "scale": 1}
        found = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def print(self, path: Path) -> None:
        """As PDF, A4, as a reader's own printing would be."""
        self.command("Emulation.setEmulatedMedia", media="", features=[])
        found = self.command(
            "Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True
        )
        path.write_bytes(base64.b64decode(found["data"]))


def ask(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    """One request to the driver; its errors are raised."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode(errors="replace")[:2000]) from error


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile in that folder; ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(folder)}
    with (folder / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                if ask("GET", f"{base}/status")["ready"]:
                    break
            time.sleep(0.1)
        flags = [*QUIET, f"--user-data-dir={folder / 'profile'}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = ask("POST", f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(base, session)
        finally:
            ask("DELETE", f"{base}/session/{session}")
    finally:
        driver.terminate()
        driver.wait(30)
