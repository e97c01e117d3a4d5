"""A headless Chromium on the two ends of a pipe (--remote-debugging-pipe): no port, and no library."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip
LIMIT_S = 60.0
KEYS = {"Enter": 13, "Escape": 27, "ArrowRight": 39}


class Chromium:
    """One tab. `events`: what the browser has said by itself, by name of the event."""

    def __init__(self, profile: Path) -> None:
        (reads, to_browser), (from_browser, writes) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]  # so that 3 and 4 are free
        self._out, self._in = to_browser, from_browser
        assert PROGRAM is not None
        self._process = subprocess.Popen(
            [PROGRAM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(end, number) for number, end in enumerate(theirs, 3)],
        )  # fmt: skip
        for end in (reads, writes, *theirs):
            os.close(end)
        self._left, self._calls, self._session = b"", 0, None
        self.events: list[tuple[str, dict[str, Any]]] = []
        (target,) = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What it answers. Raises RuntimeError for an error, and TimeoutError."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._calls:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append((found["method"], found["params"]))

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while b"\0" not in self._left:
            if not select.select([self._in], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"Chromium said nothing for {LIMIT_S:.0f} s")
            got = os.read(self._in, 1 << 20)
            if not got:
                raise RuntimeError("Chromium has ended")
            self._left += got
        message, self._left = self._left.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, width: int = 1600, height: int = 1200, dark: bool = False) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + LIMIT_S
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            assert time.monotonic() < deadline, "the page was not loaded"
            self.run("0")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; RuntimeError where it throws."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            said = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **said)

    def move_to(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self) -> None:
        for end in (self._out, self._in):
            os.close(end)
        self._process.kill()
        self._process.wait(LIMIT_S)
