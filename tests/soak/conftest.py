"""What the soak tests share: everything that is promised, tried once."""

import time
from dataclasses import dataclass

import pytest
from fault_table import Outcome, try_all
from promises import running_tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What was tried of the promises."""

    faults: list[Outcome]
    """What became of each case of the table of faults."""
    tests: dict[str, str]
    """What became of each test of a promise, by node id."""
    elapsed_s: float
    """Of all that."""


@pytest.fixture(scope="session")
def tried(tmp_path_factory) -> Tried:
    """The tests of all promises, and the table of faults beside them: either leaves one of two cores idle."""
    start = time.monotonic()
    with running_tests(tmp_path_factory.mktemp("promises")) as tests:
        faults = try_all(tmp_path_factory.mktemp("faults"))
        return Tried(faults=faults, tests=tests(), elapsed_s=time.monotonic() - start)
