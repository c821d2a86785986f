"""A headless Chromium, driven through chromedriver's HTTP interface, without any package."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
    "disable-dev-shm-usage", "hide-scrollbars",
)  # fmt: skip
_PATIENCE = 60.0


def missing() -> str:
    """Why no browser can be driven here, or ''."""
    absent = [name for name in ("chromedriver", "chromium") if not shutil.which(name)]
    return f"{' and '.join(absent)} not installed" if absent else ""


class Browser:
    """One page of a Chromium."""

    def __init__(self, session: str) -> None:
        self.session = session

    def call(self, path: str, **body: Any) -> Any:
        """A command of the WebDriver protocol."""
        return _post(f"{self.session}/{path}", body)

    def tool(self, command: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.call("goog/cdp/execute", cmd=command, params=params)

    def emulate(
        self, width: int, height: int, *, dark: bool = False, media: str = "screen"
    ) -> None:
        """The device that the page is shown on."""
        self.tool(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tool("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, address: str) -> None:
        """Loads a page and waits until it is there."""
        self.call("url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function's body in the page."""
        return self.call("execute/sync", script=script, args=list(arguments))

    def click(self, selector: str) -> None:
        """Clicks as a person does, or fails where nothing can be clicked."""
        found = self.call("element", using="css selector", value=selector)
        self.call(f"element/{next(iter(found.values()))}/click")

    def type(self, selector: str, text: str) -> None:
        """Types into a field, after what is there."""
        found = self.call("element", using="css selector", value=selector)
        self.call(f"element/{next(iter(found.values()))}/value", text=text)

    def log(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self.call("se/log", type="browser")]

    def screenshot(self, path: str | Path, *, whole: bool = False) -> None:
        """A picture of what is seen, or of the whole page."""
        shot = self.tool("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def pdf_bytes(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.tool("Page.printToPDF")["data"])


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            server = f"http://127.0.0.1:{_port(driver)}"
            arguments = [f"--{flag}" for flag in (*_FLAGS, f"user-data-dir={profile}")]
            asked = {
                "browserName": "chrome",
                "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            made = _post(f"{server}/session", {"capabilities": {"alwaysMatch": asked}})
            session = f"{server}/session/{made['sessionId']}"
            try:
                yield Browser(session)
            finally:
                with contextlib.suppress(OSError):
                    _send(urllib.request.Request(session, method="DELETE"))
        finally:
            driver.terminate()
            driver.wait(10)


def _port(driver: subprocess.Popen[bytes]) -> int:
    """Where chromedriver says that it listens."""
    assert driver.stdout is not None
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        line = driver.stdout.readline().decode()
        if "started successfully on port" in line:
            return int(line.rstrip().rstrip(".").rpartition(" ")[2])
    raise TimeoutError("chromedriver does not start")


def _post(address: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return _send(urllib.request.Request(address, data, headers))


def _send(request: urllib.request.Request) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PATIENCE) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()[:2000]) from None
