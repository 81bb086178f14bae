"""Can this job's trainer start here? Looks at the machine; starts and imports nothing."""

from __future__ import annotations

import filecmp
import importlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from runner.errors import JobError
from runner.job_entrypoint import function_problem
from runner.job_model import Job
from runner.job_tracking import missing_tracker


def resolved_command(job: Job) -> list[str]:
    """The command with its program as an absolute path; `python` is the one that runs `runner`.

    In a container, the command as it is. A name with a slash is relative to the workdir, any other
    is searched in the PATH that the trainer will have. Raises JobError naming a program that is not
    there.
    """
    word, *rest = job.command
    if job.launcher != "process":
        return list(job.command)  # its program is the image's
    if word in ("python", "python3"):
        return [sys.executable, *rest]
    if "/" in word:
        found = shutil.which(job.workdir / word)
    else:
        found = shutil.which(word, path=job.env.get("PATH"))
    if found is None:
        problem = f"command: there is no program {word!r} "
        if "/" in word:
            problem += f"in {job.workdir} that can be executed"
        elif _holds(Path.is_file, job.workdir / word):
            problem += f"in PATH; for the file in the workdir, write ./{word}"
        else:
            problem += "in PATH"
        raise JobError(problem)
    return [str(Path(found).absolute()), *rest]


def interpreter(job: Job) -> str:
    """The Python that the command begins with; the one that runs `runner` if it is no Python's."""
    program = resolved_command(job)[0]
    return program if _is_python(program) else sys.executable


def check_launchable(job: Job) -> None:
    """Raise JobError if the trainer could not even start here; nothing is started or imported.

    Checked are the workdir, the program, the script or module that Python is given (a module by
    its top-level name alone), and that `import runner` will find this package. For a container,
    only what is on this machine.
    """
    if problem := workdir_problem(job.workdir):
        raise JobError(f"workdir: {problem}")
    problems: list[str] = []
    try:
        resolved_command(job)
    except JobError as error:
        problems += error.problems
    kind, target = _python_target(job.command)
    in_image = job.launcher != "process"
    if in_image:
        problems += _missing_mounts(job)
    is_elsewhere = in_image and target.startswith("/")
    if kind == "script" and not is_elsewhere and not _holds(Path.exists, job.workdir / target):
        problems.append(f"command: there is no script {target!r} in {job.workdir}")
    if kind == "module" and not in_image and not _is_importable(job, target.partition(".")[0]):
        problems.append(f"command: there is no module {target!r} in {job.workdir} or installed")
    if shadow := shadowing_file(job):
        problems.append(
            f"command: {shadow} would be imported in place of the package `runner`; rename it"
        )
    if job.export.onnx and (problem := function_problem(job.export.onnx, import_folders(job))):
        problems.append(f"export.onnx: {problem}")
    if problem := missing_tracker(job.tracking):
        problems.append(problem)
    if problems:
        raise JobError(*problems)


def _missing_mounts(job: Job) -> list[str]:
    return [
        f"mounts[{number}].source: there is nothing at {job.workdir / mount.source}"
        for number, mount in enumerate(job.mounts)
        if not _holds(Path.exists, job.workdir / mount.source)
    ]


def shadowing_file(job: Job) -> Path | None:
    """The file or package that the trainer's `import runner` would find before this package.

    A copy of this very version is no such thing, and neither is a folder without `__init__.py`,
    which Python takes only if there is no package of that name anywhere.
    """
    importlib.invalidate_caches()
    spec = PathFinder.find_spec("runner", import_folders(job))
    if spec is None or spec.origin is None:
        return None
    found, own = Path(spec.origin), Path(__file__).with_name("__init__.py")
    if found.name == own.name and _holds(_has_bytes_of(own), found):
        return None
    return found.parent if spec.submodule_search_locations else found


def import_folders(job: Job) -> list[str]:
    """Where the trainer's imports look before the installed packages."""
    kind, target = _python_target(job.command)
    scripts = [target] if kind == "script" else []
    if kind == "program":  # a script that starts itself, or a starter that is given one
        scripts = [word for word in job.command if word.endswith(".py")]
    # Python follows links to the script before it takes its folder.
    folders = [Path(os.path.realpath(job.workdir / s)).parent for s in scripts] or [job.workdir]
    python_path = job.env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    if job.launcher == "process":  # elsewhere, these are folders of another machine
        folders += [job.workdir / entry for entry in python_path.split(os.pathsep) if python_path]
    return [str(folder) for folder in folders]


def _is_importable(job: Job, top_level: str) -> bool:
    importlib.invalidate_caches()
    if PathFinder.find_spec(top_level, import_folders(job)) is not None:
        return True
    if job.command[0] not in ("python", "python3"):
        return True  # another interpreter: what it has installed is not known here
    try:
        return bool(top_level) and importlib.util.find_spec(top_level) is not None
    except ValueError:  # `__main__` and the like: loaded, and without a spec
        return True


def _python_target(
    command: tuple[str, ...],
) -> tuple[Literal["script", "module", "code", "program"], str]:
    """What Python is asked to run; `program` if the command is not Python's.

    The options are those of https://docs.python.org/3/using/cmdline.html
    """
    if not _is_python(command[0]):
        return "program", command[0]
    words = iter(command[1:])
    for word in words:
        if word == "-":
            break
        if not word.startswith("-"):
            return "script", word
        if word == "--check-hash-based-pycs":
            next(words, None)
        letters = "" if word.startswith("--") else word[1:]
        if option := re.search("[cmWX]", letters):
            value = letters[option.end() :] or next(words, "")
            if option[0] == "m":
                return "module", value
            if option[0] == "c":
                break
    return "code", ""


def _is_python(program: str) -> bool:
    return re.fullmatch(r"python[0-9.]*", Path(program).name) is not None


def workdir_problem(workdir: Path) -> str | None:
    if _holds(Path.is_dir, workdir):
        return None
    if _holds(Path.exists, workdir):
        return f"{str(workdir)!r} is not a directory"
    return f"there is no directory {str(workdir)!r}"


def _has_bytes_of(own: Path) -> Callable[[Path], bool]:
    return lambda path: filecmp.cmp(path, own, shallow=False)


def _holds(question: Callable[[Path], bool], path: Path) -> bool:
    try:
        return question(path)
    except OSError:  # not allowed to look, or too long to be a name: not there for us either
        return False
