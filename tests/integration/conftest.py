"""What tests of whole runs share."""

from __future__ import annotations

import pytest
from nodes import nodes_in


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the run that nothing disturbs, in a process."""
    with nodes_in(tmp_path_factory.mktemp("undisturbed")) as new:
        node = new("node")
        done = node.run("run", node.training())
        assert done.code == 0, done.err
        return node.digest()
