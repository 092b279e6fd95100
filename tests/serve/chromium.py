"""A headless Chromium, spoken to in its own protocol over a pair of pipes: nothing to install but the browser."""

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-extensions",
)
_FLAGS += ("--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--mute-audio")


def _high(file: int) -> int:
    """The file by a number that is neither 3 nor 4."""
    try:
        return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10)
    finally:
        os.close(file)


class Page:
    """A tab of a browser of its own, ``width`` × ``height``; a phone's where it is narrow."""

    def __init__(self, width: int = 1000, height: int = 760):
        assert BINARY is not None
        self._profile = tempfile.mkdtemp()
        to_it, self._write = map(_high, os.pipe())
        self._read, from_it = map(_high, os.pipe())
        command = [BINARY, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(  # it reads its file 3 and writes to its 4
            ["bash", "-c", f'exec "$@" 3<&{to_it} 4>&{from_it}', "bash", *command],
            pass_fds=(to_it, from_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_it)
        os.close(from_it)
        self._held, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **shape)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                came = os.read(self._read, 1 << 20)
                assert came, "the browser has gone"
                self._held += came
            first, _, self._held = self._held.partition(b"\0")
            told = json.loads(first)
            if told.get("id") == self._number:
                assert "error" not in told, (method, told)
                return told["result"]
            self.events.append(told)

    def evaluate(self, script: str) -> Any:
        told = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """What it comes to, once that is something."""
        last = time.monotonic() + seconds
        while not (found := self.evaluate(script)):
            assert time.monotonic() < last, (script, self.evaluate("document.body.innerText"))
            time.sleep(0.05)
        return found

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Of the console and of the network: errors, and addresses other than that of the page."""
        self.call("Runtime.enable")
        found = []
        for event in self.events:
            method, given = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Log.entryAdded" and given["entry"]["level"] == "error"
            ):
                found.append(json.dumps(given)[:300])
        return found

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        os.close(self._write)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)
