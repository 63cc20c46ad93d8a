"""The count of type errors: it may fall, and that is written down; it may not rise."""

import pytest
from type_check import HEADER, compare, errors_by_room, lowered, with_counts

OUTPUT = """\
.mypy_packages/glm_rlhf/engine/rl/roles.py:100: error: Argument 3 has an incompatible type  [arg-type]
.mypy_packages/glm_rlhf/engine/rl/roles.py:100: note: see there
.mypy_packages/glm_rlhf/engine/data/records/parquet.py:22: error: Skipping  [import-untyped]
.mypy_packages/glm_rlhf/engine/cli.py:3: error: Need a type  [var-annotated]
"""


def test_errors_are_counted_by_sub_package():
    errors = errors_by_room(OUTPUT)
    assert {room: len(lines) for room, lines in errors.items()} == {
        "engine/rl": 1,
        "engine/data": 1,
        "engine": 1,
    }
    assert errors["engine/rl"] == [
        "engine/rl/roles.py:100: error: Argument 3 has an incompatible type  [arg-type]"
    ]


def test_errors_of_an_installed_wheel_are_none_of_ours():
    with pytest.raises(RuntimeError, match="other files than the checkout's"):
        errors_by_room("/venv/site-packages/glm_rlhf/engine/cli.py:3: error: Need a type  [var-annotated]\n")


def test_a_count_may_fall_and_not_rise():
    errors = errors_by_room(OUTPUT)
    assert compare(errors, {"engine/rl": 1, "engine/data": 1, "engine": 1}) == []
    *listed, said = compare(errors, {"engine/data": 1, "engine": 1})
    assert said == "engine/rl: mypy finds 1 errors, 0 are recorded: fix the new ones"
    assert listed == errors["engine/rl"]
    (said,) = compare(errors, {"engine/rl": 3, "engine/data": 1, "engine": 1})
    assert said.startswith("engine/rl: mypy finds 1 errors, 3 are recorded: run ")


def test_a_record_is_only_lowered():
    counts = lowered(errors_by_room(OUTPUT), {"engine/rl": 3, "engine/data": 1, "kernels/rl": 2})
    assert counts == {"engine/data": 1, "engine/rl": 1}
    text = f'[a]\nb = 1\n\n{HEADER}"engine/rl" = 3\n"kernels/rl" = 2\n\n[c]\n'
    assert with_counts(text, counts) == f'[a]\nb = 1\n\n{HEADER}"engine/data" = 1\n"engine/rl" = 1\n\n[c]\n'
