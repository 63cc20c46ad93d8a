"""What the soak tests share: the table of faults, tried once."""

import pytest
from fault_table import Outcome, try_all


@pytest.fixture(scope="session")
def fault_outcomes(tmp_path_factory) -> list[Outcome]:
    """What became of each case of the table of faults."""
    return try_all(tmp_path_factory.mktemp("faults"))
