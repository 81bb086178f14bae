"""Where a checkpoint comes from: code, versions and machine, for its manifest and the run's record.

Plain JSON, and nothing secret: the environment is never read into it, and what looks like a
password or a key in the command or the parameters is replaced by `***`. What cannot be found out
is null; nothing here fails because of it. Collecting takes a git call of a few milliseconds and
listing the folders of installed packages; it changes nothing, and may run in a thread.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoint.code import GIT_LOCATIONS, MAX_PATCH_BYTES, changes
from runner.errors import StoreError

if TYPE_CHECKING:  # a trainer under a supervisor imports this, and has no store
    from runner.store import Store

log = logging.getLogger(__name__)

GIT_TIMEOUT_SECONDS = 5.0
MASK = "***"

# https://git-scm.com/docs/git-status#_porcelain_format_version_2
_GIT_STATUS = (
    *("git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch"),
    *("--untracked-files=normal", "--no-ahead-behind", "--no-renames"),
)


def collect(workdir: Path, command: Sequence[str]) -> dict[str, Any]:
    """The facts about this machine, this Python and the code in `workdir`, as plain JSON.

    `host`, `platform`; `cpu`: `model`, `count`, and `usable` by this process; `python`: `version`
    and `implementation`; `git`: `commit`, `branch`, `dirty` (see `git_state`), and what `changes`
    there are; `packages`: versions by normalized name; `command`, masked. What the trainer alone
    can know is not here.
    """
    git = git_state(workdir)
    found = changes(workdir) if git["dirty"] else None
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "count": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)),
        },
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
        },
        "git": git if found is None else {**git, **found.to_json()},
        "packages": installed_packages(),
        "command": mask_command(command),
    }


def keep_changes(store: Store, run_id: str, workdir: Path) -> None:
    """Store the patch as `<run>/diffs/<digest>.patch`, once; what looks like a secret is masked.

    A warning says so where that cannot be.
    """
    found = changes(workdir)
    if found is None or not (found.patch or found.untracked):
        return
    if len(found.patch) > MAX_PATCH_BYTES:
        log.warning("the uncommitted changes have %.0f MB and are not kept", len(found.patch) / 1e6)
        return
    text = _mask_text(found.patch.decode(errors="surrogateescape"))
    try:
        key = f"{run_id}/diffs/{found.digest}.patch"
        store.create(key, text.encode(errors="surrogateescape"))
    except StoreError as error:
        log.warning("the uncommitted changes could not be kept: %s", error)


def git_state(workdir: Path) -> dict[str, Any]:
    """`commit`, `branch` and `dirty` of the repository around `workdir`.

    Dirty means that the commit does not say what runs: something is changed, or neither tracked nor
    ignored. All three are null if git does not tell: it is missing, slow (`GIT_TIMEOUT_SECONDS`),
    there is no repository, or it belongs to somebody else (`safe.directory`). `branch` is null for
    a detached head, `commit` before the first one. One call, which takes no lock and runs no hook.
    """
    environment = {name: v for name, v in os.environ.items() if name not in GIT_LOCATIONS}
    try:
        status = subprocess.run(
            _GIT_STATUS,
            cwd=workdir,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "branch": None, "dirty": None}
    lines = status.stdout.decode(errors="replace").splitlines()
    headers = dict(line[2:].partition(" ")[::2] for line in lines if line.startswith("# "))
    commit, branch = headers.get("branch.oid"), headers.get("branch.head")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": any(not line.startswith("# ") for line in lines),
    }


def installed_packages(search_path: Iterable[str] | None = None) -> dict[str, str]:
    """Versions by normalized name (PEP 503), as importlib.metadata finds them on `sys.path`.

    They are taken from the names of the `.dist-info` folders, which hold both (PEP 427): parsing
    the metadata of each takes a hundred times as long.
    """
    versions: dict[str, str] = {}
    for folder in sys.path if search_path is None else search_path:
        try:
            names = sorted(os.listdir(folder or "."))  # noqa: PTH208 - names are all that is needed
        except OSError:  # a zip file, or not there
            continue
        for file in names:
            stem, kind = os.path.splitext(file)  # noqa: PTH122
            if kind not in (".dist-info", ".egg-info"):
                continue
            name, _, version = stem.rpartition("-")
            if kind == ".egg-info" or not name:
                name, version = _read_metadata(Path(folder, file))
            if name and version and not name.startswith("~"):  # pip's remains of a removal
                # The first on the path is the one that is imported.
                versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(versions.items()))


def _read_metadata(path: Path) -> tuple[str, str]:
    for file in (path / "METADATA", path / "PKG-INFO", path):
        try:
            header = file.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        except OSError:
            continue
        fields = dict(line.partition(": ")[::2] for line in header.splitlines())
        return fields.get("Name", ""), fields.get("Version", "")
    return "", ""


def _cpu_model() -> str | None:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return None  # ARM has none


# ---------------------------------------------------------------- masking

_KEY_WORDS = (
    r"secret|password|passwd|passphrase|credential|authorization|(?<![a-z])pwd(?![a-z])"
    r"|(?:api|access|account|private|signing|encryption|ssh)[-_ ]?key"
)
_SECRET = re.compile(_KEY_WORDS, re.IGNORECASE)
_TOKEN = re.compile(r"token(?!iz)", re.IGNORECASE)  # tokens are counted, too: max_tokens: 512
_COUNT = re.compile(r"[+-]?[\d._]{1,9}[kKmMgGbB]?")

_PEM = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_LOOKS_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|hf_[A-Za-z0-9]{16,}"
    r"|sk-(?=[\w-]{0,60}\d)[\w-]{20,}"  # OpenAI, Anthropic and others
    r"|xox[abeoprs]-[\w-]{10,}"  # Slack
    r"|AIza[\w-]{30,}|ya29\.[\w.-]{10,}"  # Google
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r")"
    r"|(?<=://)[^/\s?#]*:[^/\s?#]*(?=@)"  # user:password@ in a URL
    r"|(?<=[?&]sig=)[^&\s#]+|(?<=[?&]key=)[^&\s#]+"
)
_AUTHORIZATION = re.compile(
    r"""(authorization["']?\s*[:=]\s*["']?|\bbearer\s+)[^"'\n]+""", re.IGNORECASE
)
_ASSIGNMENT = re.compile(
    rf"""(?<![\w.-])(?P<name>[\w.-]{{0,80}}(?:{_KEY_WORDS}|token(?!iz))[\w.-]{{0,80}})
        (?P<between>["']?\s*[:=]\s*)
        (?P<value>"(?:[^"\\]|\\.)*" | '[^']*' | [^\s"']+)""",
    re.IGNORECASE | re.VERBOSE,
)
_OPTION = re.compile(
    rf"""(?P<name>(?<!\S)--?[\w.-]{{0,80}}(?:{_KEY_WORDS}|token(?!iz))[\w.-]{{0,80}})
        (?P<between>\s+)
        (?P<value>"(?:[^"\\]|\\.)*" | '[^']*' | [^\s"'-][^\s"']*)""",
    re.IGNORECASE | re.VERBOSE,
)


def mask_secrets(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of (nested) parameters in which secrets are replaced by `***`.

    Secret is what stands under a telling name (token, secret, password, api_key, credential, …) and
    what looks like a key wherever it stands (AWS, GitHub, Hugging Face, …, PEM, `user:password@` in
    a URL); of a longer text only that part is replaced. Null, true and false, empty strings and
    numbers of tokens are kept. Sequences become lists, as in JSON. Masking twice changes nothing.
    """
    return {name: _mask(value, str(name)) for name, value in mapping.items()}


def mask_command(command: Sequence[str]) -> list[str]:
    """The same for arguments: `--api-key=…`, `--api-key …`, `token=…`, also within a shell's."""
    return _mask_list(command, "")


def _mask_list(values: Sequence[Any], name: str) -> list[Any]:
    """Any list may be a command, where an option tells what the next item is."""
    masked = []
    option = ""
    for value in values:
        is_flag = isinstance(value, str) and value.startswith("-")
        masked.append(_mask(value, name if is_flag else f"{name} {option}"))
        option = value if is_flag and re.fullmatch(r"--?[\w.-]+", value) else ""
    return masked


def _is_secret(name: str, value: str | float) -> bool:
    if _SECRET.search(name):
        return True
    return bool(_TOKEN.search(name)) and not _COUNT.fullmatch(str(value))


def _mask(value: Any, name: str) -> Any:
    """`value` without secrets, where `name` or one of the names around it may be telling."""
    if isinstance(value, Mapping):
        return {key: _mask(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return _mask_list(value, name)
    if value is None or isinstance(value, bool) or value == "":
        return value
    if isinstance(value, str):
        return MASK if _is_secret(name, value) else _mask_text(value)
    if isinstance(value, int | float):
        return MASK if _SECRET.search(name) else value
    return MASK if _SECRET.search(name) or _TOKEN.search(name) else value


def _mask_text(text: str) -> str:
    text = _LOOKS_SECRET.sub(MASK, _PEM.sub(MASK, text))
    text = _AUTHORIZATION.sub(rf"\1{MASK}", text)
    return _OPTION.sub(_mask_match, _ASSIGNMENT.sub(_mask_match, text))


def _mask_match(match: re.Match[str]) -> str:
    name, between, value = match.group("name", "between", "value")
    bare = value.strip("\"'")
    if not bare or not _is_secret(name, bare):
        return match.group()
    return f"{name}{between}{value.replace(bare, MASK)}"
