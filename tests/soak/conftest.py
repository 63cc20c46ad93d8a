"""The fixture of the soak tests: all promises and faults, tried once."""

import time
from dataclasses import dataclass

import pytest
from fault_table import Outcome, try_all
from promises import running_tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """Results of all promises and faults."""

    faults: list[Outcome]
    """Outcome of each case of the fault table."""
    tests: dict[str, str]
    """Outcome of each test of a promise, by node id."""
    elapsed_s: float
    """Total time."""


@pytest.fixture(scope="session")
def tried(tmp_path_factory) -> Tried:
    """The tests of all promises, and the fault table in parallel: either leaves one of two cores idle."""
    start = time.monotonic()
    with running_tests(tmp_path_factory.mktemp("promises")) as tests:
        faults = try_all(tmp_path_factory.mktemp("faults"))
        return Tried(faults=faults, tests=tests(), elapsed_s=time.monotonic() - start)
