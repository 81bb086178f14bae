"""What several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import Children
from nodes import Node, nodes_in

pytest_plugins = ["servers.fixtures"]


@pytest.fixture
def new_node(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Makes nodes by name, which share a store. Nothing of them may be left in the end."""
    with nodes_in(tmp_path) as new:
        yield new


@pytest.fixture
def node(new_node: Callable[[str], Node]) -> Node:
    """A machine of its own. Nothing of it may be left in the end."""
    return new_node("node")


@pytest.fixture
def children() -> Iterator[Children]:
    started = Children()
    yield started
    started.end()
