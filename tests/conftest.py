"""What several test files share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import Node


@pytest.fixture
def new_node(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Makes nodes that share a store; afterwards, nothing of them may be left."""
    nodes = []

    def new(name: str) -> Node:
        node = Node(tmp_path / name, _memory(), tmp_path / "store")
        nodes.append(node)
        return node

    yield new
    left = {str(node.folder): node.end() for node in nodes}
    spools = [spool for node in nodes if not node.keeps_spool for spool in node.spools()]
    for node in nodes:
        shutil.rmtree(node.memory)
    assert not any(left.values()), f"processes are left: {left}"
    assert not spools, f"spools are left: {spools}"


@pytest.fixture
def node(new_node: Callable[[str], Node]) -> Node:
    """A machine of its own, on which nothing may be left."""
    return new_node("node")


def _memory() -> Path:
    shared_memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=shared_memory if shared_memory.is_dir() else None)
    return Path(folder)
