"""A headless Chromium, driven through a pipe (Chrome DevTools Protocol) without a library or a port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One page of `size` (width, height) pixels. A context manager."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        self._folder, self._size, self._number, self._waiting = folder, size, 0, b""

    def __enter__(self) -> Self:
        theirs, self._to = os.pipe()
        self._from, mine = os.pipe()
        # It reads from descriptor 3 and writes to 4.
        options = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --remote-debugging-pipe"
        script = f'exec "$0" "$@" 3<&{theirs} 4>&{mine}'
        command = ["bash", "-c", script, PROGRAM, *options.split(), f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(theirs, mine), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(mine)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        width, height = self._size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._to)
        self._process.kill()
        self._process.wait()
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or the value of the promise that it returns."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self) -> np.ndarray:
        """(height, width, 3) uint8."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(BytesIO(data)).convert("RGB"))

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        said = {"id": self._number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(said).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            data = os.read(self._from, 2**20)
            assert data, "chromium has ended"
            self._waiting += data
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)
