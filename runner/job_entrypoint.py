"""Whether a function that a job names is there and can be called, as its source tells.

Nothing is imported: that would run the job's code, and load torch where a job is only submitted.
What is not defined in the source itself is not judged.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path


def function_problem(entrypoint: str, folders: Sequence[str], arguments: int = 1) -> str | None:
    """Why `module:function` cannot be called with so many arguments; None if nothing is known.

    `folders` are where its module is looked for, before the installed packages.
    """
    module, _, name = entrypoint.partition(":")
    importlib.invalidate_caches()
    spec, places = None, [*folders, *sys.path]
    for depth in range(module.count(".") + 1):
        spec = PathFinder.find_spec(".".join(module.split(".")[: depth + 1]), places)
        if spec is None:
            return f"there is no module {module!r}"
        places = list(spec.submodule_search_locations or ())
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        return f"{spec.origin} cannot be read: {error}"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        is_given = any(name in ast.unparse(node) for node in tree.body if _may_define(node))
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return None if is_given else f"module {module} has no {name!r}{hint}"
    given = functions[name].args
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    keywords = sum(default is None for default in given.kw_defaults)
    takes = required <= arguments and (given.vararg or len(positional) >= arguments)
    if not takes or keywords:
        return f"{entrypoint}({ast.unparse(given)}) cannot be called with the folder of an export"
    return None


def _may_define(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.ClassDef)
