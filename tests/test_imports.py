"""Who may import whom: the package is a stack, and what is heavy or dangerous has one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runner

PACKAGE = Path(runner.__file__).parent
GROUND = "ground"

# Each layer may import itself and those named here. Everything else directly below `runner/` is
# the ground, which imports nothing but the ground.
BELOW: dict[str, set[str]] = {
    "cli": {
        "tracking",
        "doctor",
        "simulation",
        "views",
        "supervisor",
        "launch",
        "checkpoint",
        "store",
        GROUND,
    },
    "doctor": {"supervisor", "launch", "checkpoint", "notices", "store", GROUND},
    "simulation": {"supervisor", "launch", "checkpoint", "store", GROUND},
    "views": {"supervisor", "checkpoint", "store", GROUND},
    "supervisor": {"tracking", "launch", "checkpoint", "notices", "store", GROUND},
    "tracking": {"checkpoint", "store", GROUND},
    "launch": {"checkpoint", "store", GROUND},
    "training": {"checkpoint", "store", GROUND},
    "checkpoint": {"store", GROUND},
    "store": {GROUND},
    "notices": {GROUND},
    GROUND: set(),
}
MODULES = {
    ".".join(["runner", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def layer_of(module: str) -> str:
    name = [*module.split("."), ""][1]
    if name == "__main__":
        return "cli"
    return name if name in BELOW else GROUND


class Imports(ast.NodeVisitor):
    """The modules that a module imports when it runs, wherever in it that stands."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: imports are written out"
        assert node.module is not None
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            self.found.append((whole if whole in MODULES else node.module, node.lineno))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)


def imports_of(module: str) -> list[tuple[str, int]]:
    visitor = Imports()
    visitor.visit(ast.parse(MODULES[module].read_text()))
    return visitor.found


def all_imports() -> Iterator[tuple[str, str, str]]:
    """Module, what it imports, and where that stands."""
    for module, path in MODULES.items():
        for imported, line in imports_of(module):
            yield module, imported, f"{path.relative_to(PACKAGE.parent)}:{line}"


def test_every_layer_is_there() -> None:
    layers = {layer_of(module) for module in MODULES}
    assert layers == set(BELOW)
    known = {"errors", "exitcodes", "job", "plan", "spool", "units"}
    assert known <= {m.removeprefix("runner.") for m in MODULES if layer_of(m) == GROUND}


def test_imports_run_downwards_only() -> None:
    upwards = [
        f"{where}: {module} ({layer_of(module)}) imports {imported} ({layer_of(imported)})"
        for module, imported, where in all_imports()
        if imported.split(".")[0] == "runner"
        and layer_of(imported) not in BELOW[layer_of(module)] | {layer_of(module)}
    ]
    assert upwards == []


def test_what_is_imported_from_the_package_is_there() -> None:
    missing = [
        f"{where}: {imported}"
        for _, imported, where in all_imports()
        if imported.split(".")[0] == "runner" and imported not in MODULES
    ]
    assert missing == []


def test_no_module_imports_itself_in_a_circle() -> None:
    above: list[str] = []
    done: set[str] = set()

    def follow(module: str) -> None:
        assert module not in above, f"{' → '.join([*above[above.index(module) :], module])}"
        if module in done:
            return
        above.append(module)
        for imported, _ in imports_of(module):
            # A package that is imported for the sake of what lies in it is no circle.
            if imported in MODULES and imported != module:
                follow(imported)
        above.pop()
        done.add(module)

    for module in MODULES:
        follow(module)


# Which libraries are for whom; every other layer does without them.
PLACES = {
    "torch": {"training"},
    "torchdata": {"training"},
    "numpy": {"training", "checkpoint"},
    "backports": {"checkpoint"},
    "boto3": {"store"},
    "botocore": {"store"},
    "prometheus_client": {"supervisor"},
    "typer": {"cli"},
    "kubernetes": {"launch"},
    "docker": {"launch"},
    "requests": {"launch"},
    "mlflow": {"tracking"},
    "wandb": {"tracking"},
    "clearml": {"tracking"},
    "rich": {"views"},
    "onnx": {"training"},
    "onnxruntime": {"training"},
}


@pytest.mark.parametrize(("library", "layers"), PLACES.items())
def test_a_library_has_its_place(library: str, layers: set[str]) -> None:
    elsewhere = [
        where
        for module, imported, where in all_imports()
        if imported.split(".")[0] == library and layer_of(module) not in layers
    ]
    assert elsewhere == []


def test_the_cluster_is_spoken_to_in_one_module() -> None:
    def speakers(library: str) -> set[str]:
        found = all_imports()
        return {module for module, imported, _ in found if imported.split(".")[0] == library}

    assert speakers("kubernetes") == {"runner.launch.kubernetes.client"}
    # The engine's own module knows its errors, which come through where a stream is read.
    assert speakers("urllib3") == {"runner.launch.kubernetes.client", "runner.launch.engine"}


PICKLES = {"pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "joblib",
           "shelve", "marshal"}  # fmt: skip


def test_nothing_is_pickled() -> None:
    assert [w for _, imported, w in all_imports() if imported.split(".")[0] in PICKLES] == []


def test_nothing_is_saved_or_loaded_by_what_pickles_inside() -> None:
    pickling = {
        f"{module}.{name}" for module in ("torch", "np", "numpy") for name in ("save", "load")
    }
    calls = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in pickling
    ]
    assert calls == []


def test_a_script_may_import_exactly_this() -> None:
    assert runner.__all__ == ["Preempted", "Run", "__version__", "attach", "params"]
    assert set(runner.__all__) == {"__version__", *runner._HOMES}
    with pytest.raises(AttributeError):
        _ = runner.supervise_everything  # type: ignore[attr-defined]


def modules_after(statements: str) -> set[str]:
    """What a fresh interpreter has loaded after these statements."""
    program = f"import sys\n{statements}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", program], text=True).split())


HEAVY = {"torch", "numpy", "boto3", "docker", "kubernetes", "mlflow", "wandb", "clearml"}
SUPERVISORS = {"boto3", "docker", "prometheus_client", "psutil", "pydantic", "requests", "rich",
               "safetensors", "typer", "watchdog", "yaml"}  # fmt: skip


@pytest.mark.parametrize(
    "module",
    ["runner", "runner.supervisor.loop", "runner.supervisor.service", "runner.simulation",
     "runner.cli"],
)  # fmt: skip
def test_the_supervisor_loads_nothing_heavy(module: str) -> None:
    loaded = modules_after(f"import {module}")

    assert module in loaded
    assert loaded & HEAVY == set()


def test_a_training_script_loads_torch_and_no_cloud() -> None:
    loaded = modules_after("from runner import *")

    assert "runner.training.run" in loaded
    assert loaded & HEAVY == {"torch", "numpy"}
    assert loaded & SUPERVISORS == set(), "the package without its extras has none of them"
    here = {name for name in loaded if name.startswith(("runner.store", "runner.supervisor"))}
    assert here == set(), "a restart waits for every import"
    assert "runner.checkpoint.keeper" not in loaded


@pytest.mark.parametrize("library", ["typer", "pydantic"])
def test_a_command_without_its_libraries_says_what_to_install(library: str) -> None:
    program = f"import sys; sys.modules[{library!r}] = None; from runner.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", program, "submit", "job.yaml"], capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stderr.startswith(f"runner: {library} is not installed")
    assert "pip install 'runner[supervisor]'" in done.stderr
