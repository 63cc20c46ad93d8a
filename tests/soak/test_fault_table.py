"""One rank of a PPO run under torchrun meets a fault: what is promised of each kind, phase and rank holds."""

import pytest
from fault_table import CASES, PHASES
from faulty_run import FAULTS
from promises import ROOT, ROWS


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_what_is_promised_of_each_fault_holds(tried):
    failures = [f"{outcome.case.fault}: {outcome.failure}" for outcome in tried.faults if outcome.failure]
    assert not failures, "\n".join(failures)


def test_the_table_has_every_kind_and_every_rank_in_every_phase():
    tried = {(case.fault.kind, case.fault.phase, case.fault.rank) for case in CASES}
    assert len(FAULTS) >= 15
    assert {kind for kind, *_ in tried} == set(FAULTS)
    for kind in ("kill", "SIGTERM"):
        assert {(kind, phase, rank) for phase in PHASES for rank in (0, 1)} <= tried


def test_every_promise_names_tests_that_exist():
    for row in ROWS:
        for test in row.tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), test
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test
