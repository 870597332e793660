"""A headless Chromium for tests, where one is installed: its own protocol over a pipe, nothing else needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check",
    "--remote-debugging-pipe", "--hide-scrollbars",
)  # fmt: skip
PATIENCE = 30  # seconds
# Chromium reads its commands from file 3 and answers on file 4; first both are moved out of each other's way.
ENDS = """
import os, sys
ends = [os.dup(int(word)) for word in sys.argv[1:3]]
while min(ends) < 5:
    ends = [os.dup(end) for end in ends]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One page in a browser of its own; `complaints` are console errors, `asked` the addresses it asked for."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        self._profile = profile
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self._number = 0

    def __enter__(self) -> Page:
        (theirs, self._write), (self._read, their_write) = os.pipe(), os.pipe()
        words = [str(PROGRAM), *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._browser = subprocess.Popen(
            [sys.executable, "-c", ENDS, str(theirs), str(their_write), *words], pass_fds=(theirs, their_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(their_write)
        self._rest = b""
        self._session: str | None = None
        targets = self.do("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._browser.terminate()
        self._browser.wait()
        os.close(self._read)
        os.close(self._write)

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """Give one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        """The next message; what the page complains of or asks for is noted."""
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], PATIENCE)[0], f"Chromium said nothing for {PATIENCE} seconds"
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium went away"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        params = message.get("params", {})
        match message.get("method"):
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(params["args"]))
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])
        return message

    def open(self, path: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """Open a file in a window of this width, light or dark."""
        phone = width < 600
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.do("Page.navigate", url=path.absolute().as_uri())
        while self.value("document.readyState") != "complete":
            pass

    def value(self, script: str) -> Any:
        """What a script gives on this page."""
        found = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        facts: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": codes[key], "code": key.replace(" ", "Space")}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.do("Input.dispatchKeyEvent", type="keyDown", **facts, **({"text": text} if text else {}))
        self.do("Input.dispatchKeyEvent", type="keyUp", **facts)

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save what the page looks like."""
        found = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
