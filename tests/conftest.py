"""What several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import Children
from hypothesis import settings
from nodes import Node, nodes_in

pytest_plugins = ["servers.fixtures"]

# How long an example takes is the machine's business, which is busy with other tests.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


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
