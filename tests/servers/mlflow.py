"""A real MLflow server for tests, with a database of its own; it can be stopped and started again.

What `mlflow-skinny` lacks for serving is in the `dev` extra.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from waiting import wait_until

_START_SECONDS = 120.0
_VARIABLES = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # the jobs of its GenAI part: two more processes
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MLflowServer:
    """Started with `up`, ended with `down`; what it was told stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        log = (self._folder / "server.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"),
                    *("--artifacts-destination", str(self._folder / "artifacts")),
                ],
                cwd=self._folder,
                env={**os.environ, **_VARIABLES},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, _START_SECONDS, "the MLflow server")

    def down(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, 9)
            process.wait()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False
