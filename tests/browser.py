"""Headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) through a
pair of pipes: messages are JSON, each with a NUL behind it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

__all__ = ["Page", "browsing", "chromium"]

_TIMEOUT = 60.0
#: It reads from descriptor 3 and writes to 4.
_RUN = "import os, sys; r, w = map(int, sys.argv[1:3]); r, w = os.dup2(r, 60), os.dup2(w, 61); os.dup2(60, 3); " \
       "os.dup2(61, 4); os.close(60); os.close(61); os.execv(sys.argv[3], sys.argv[3:])"


def chromium() -> str | None:
    """Its program."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One page after the other. What the one that is open asked the network for is in ``requests``."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._rest = b""
        self._number = 0
        self._session = ""
        self.requests: list[str] = []
        self._loaded = False

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Its answer."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self._read, 1 << 16)
            assert data, "Chromium has ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded = self._loaded or message.get("method") == "Page.loadEventFired"
        return message

    def open(self, url: str, width: int = 1000, height: int = 900) -> None:
        """In a tab of its own."""
        self._session, self.requests = "", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.enable")
        self.call("Network.enable")
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """Of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def media(self, kind: str = "screen", scheme: str = "light") -> None:
        """On screen or in print; by day or by night."""
        self.call("Emulation.setEmulatedMedia", media=kind,
                  features=[{"name": "prefers-color-scheme", "value": scheme}])

    def key(self, name: str) -> None:
        codes = {"Tab": 9, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name],
                      **text)

    def tree(self) -> list[tuple[str, str]]:
        """(role, name) of all that a screen reader meets, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]

    def picture(self) -> bytes:
        """A PNG of all of it."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextlib.contextmanager
def browsing() -> Iterator[Page]:
    """It leaves nothing behind."""
    program = chromium()
    assert program is not None
    theirs_read, write = os.pipe()
    read, theirs_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="svt-chromium-") as home:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(theirs_read), str(theirs_write), program, "--headless", "--no-sandbox",
             "--remote-debugging-pipe", f"--user-data-dir={home}", "--no-first-run", "--disable-gpu",
             "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"],
            pass_fds=[theirs_read, theirs_write], start_new_session=True,
            env={**os.environ, "HOME": home, "XDG_RUNTIME_DIR": home, "XDG_STATE_HOME": home, "XDG_CONFIG_HOME": home},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_read)
        os.close(theirs_write)
        try:
            yield Page(read, write)
        finally:
            os.close(write)
            os.close(read)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_TIMEOUT)
