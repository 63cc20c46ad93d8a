"""A world of one rank, for tests of what upstream does."""

from collections.abc import Iterator

import pytest

from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture
def topology(monkeypatch) -> Iterator[Topology]:
    """This process as the only rank."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with open_topology(Layout()) as topology:
        yield topology
