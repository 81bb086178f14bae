"""A real headless Chromium, driven through ChromeDriver by plain HTTP: nothing else is installed.

    with Browser(folder) as browser:
        browser.open(url)
        browser.run("return document.title")
        browser.look_at(Path("page.png"))

The protocol: https://www.w3.org/TR/webdriver2/, and Chromium's own command for the rest:
https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs Chromium and ChromeDriver (Debian: chromium, chromium-driver)"
_TIMEOUT_SECONDS = 60.0
# Of a browser that may speak to this machine alone; in a container it has no sandbox of its own.
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


class Browser:
    """One window; `folder` is for what it writes down."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None, MISSING
        assert DRIVER is not None, MISSING
        self._profile = tempfile.mkdtemp(dir=folder)
        self._driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._url = ""
        try:
            self._url = f"http://127.0.0.1:{self._port()}"
            self._url += f"/session/{self._begin()}"
            self.open("about:blank")
            self.messages()
            self.requests()
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call("DELETE", "")
        self._driver.terminate()
        self._driver.wait(_TIMEOUT_SECONDS)
        assert self._driver.stdout is not None
        self._driver.stdout.close()

    # ------------------------------------------------------------------ what a person does

    def open(self, url: str) -> None:
        """Go there, and wait until it has loaded."""
        self._call("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns, run in the page."""
        return self._call("POST", "/execute/sync", script=script, args=list(arguments))

    def resize(self, width: int, height: int = 900) -> None:
        """The size of the page's viewport, as that of a device."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def look_at(self, path: Path, *, whole: bool = True) -> Path:
        """A picture of the page."""
        shot = self.command(
            "Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole)
        )
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def messages(self) -> list[str]:
        """What the console has said since the last time."""
        entries = self._call("POST", "/se/log", type="browser")
        return [str(entry["message"]) for entry in entries]

    def requests(self) -> list[str]:
        """The URLs that pages have asked for since the last time, that of the page itself first."""
        urls = []
        for entry in self._call("POST", "/se/log", type="performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                urls.append(event["params"]["request"]["url"])
        return urls

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", cmd=name, params=parameters)

    # ------------------------------------------------------------------ the protocol

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "scale": 1}}

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if "successfully on port" in line:
                return int(line.rsplit(" ", 1)[1].rstrip(".\n"))
        raise AssertionError("ChromeDriver does not start")

    def _begin(self) -> str:
        options = {
            "binary": CHROMIUM,
            "args": [*_FLAGS, f"--user-data-dir={self._profile}"],
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        begun = self._call("POST", "/session", capabilities={"alwaysMatch": wanted})
        return str(begun["sessionId"])

    def _call(self, method: str, path: str, **content: Any) -> Any:
        body = json.dumps(content).encode() if method == "POST" else None
        request = urllib.request.Request(self._url + path, body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            said = json.load(error)["value"]
            raise AssertionError(f"{said['error']}: {said['message']}") from None
