"""Rewards from a function: every invalid reward is an error that names its answer, and none is replaced."""

import math
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from reward_requests import reward_requests

from glm_rlhf.engine.rewards.function import (
    RewardError,
    RewardFailure,
    RewardRequest,
    call_reward_function,
    import_reward_function,
)


def requests(count: int) -> list[RewardRequest]:
    return [
        RewardRequest(
            prompt_tokens=(1,),
            response_tokens=(2, place),
            prompt=None,
            response=None,
            is_finished=True,
            extra={"place": place},
        )
        for place in range(count)
    ]


WHOLE = {
    "float32": lambda n: np.full(n, 0.5, dtype=np.float32),
    "float64": lambda n: np.full(n, 0.5),
    "float16 in a list": lambda n: [np.float16(0.5)] * n,
    "0-dim arrays": lambda n: [np.array(0.5)] * n,
    "tensor": lambda n: torch.full((n,), 0.5),
    "tensor in bf16, trained": lambda n: torch.full((n,), 0.5, dtype=torch.bfloat16, requires_grad=True),
    "0-dim tensors": lambda n: [torch.tensor(0.5)] * n,
    "Decimal": lambda n: [Decimal("0.5")] * n,
    "Fraction": lambda n: [Fraction(1, 2)] * n,
    "generator": lambda n: (0.5 for _ in range(n)),
}


@pytest.mark.parametrize("returned", WHOLE.values(), ids=WHOLE.keys())
def test_numbers_of_any_type_are_floats(returned):
    found = call_reward_function(lambda asked: returned(len(asked)), requests(3))
    assert found == [0.5] * 3
    assert all(type(reward) is float for reward in found)


@pytest.mark.parametrize(
    "returned",
    [np.array([2, 0, 1]), torch.tensor([2, 0, 1]), [2, np.False_, True], np.array([2, 0, 1], dtype=np.uint8)],
    ids=["int64", "tensor", "bools", "uint8"],
)
def test_whole_numbers_and_bools_are_floats(returned):
    assert call_reward_function(lambda _: returned, requests(3)) == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "row",
    [np.array([1, 2]), np.array([1.0, 2.0], dtype=np.float32), torch.tensor([1.0, 2.0]), (1, np.int8(2))],
)
def test_rows_of_numbers_are_rewards_per_token(row):
    assert call_reward_function(lambda asked: [row for _ in asked], requests(2)) == [(1.0, 2.0)] * 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (np.ones(3), "it has 3 numbers for an answer of 2 tokens"),
        (np.ones((2, 2)), "at token 0, a finite number is required"),
        (np.array([1.0, np.nan]), "it is nan at token 1"),
        (torch.tensor([1.0, np.inf]), "it is inf at token 1"),
        (np.array(["1", "2"]), "it is '1' at token 0"),
        (b"12", "a finite number is required"),
    ],
    ids=["another length", "two dimensions", "NaN", "infinite", "texts", "bytes"],
)
def test_rows_of_anything_else_are_failures(row, words):
    (failure,) = call_reward_function(lambda _: [row], requests(1), skip_failures=True)
    assert words in failure.reason


@pytest.mark.parametrize(
    "rewards",
    [[0.5, -2, 0], [1e38, -1e38, 1e-300], [0.0, 0.0, 0.0]],
    ids=["numbers", "far away but finite", "all identical"],
)
def test_finite_numbers_pass_as_they_are(rewards):
    found = call_reward_function(lambda _: rewards, requests(3))
    assert found == rewards
    assert all(type(reward) is float for reward in found)


def test_the_function_sees_the_answers_in_order_with_their_fields():
    found = call_reward_function(lambda asked: [request.extra["place"] for request in asked], requests(4))
    assert found == [0.0, 1.0, 2.0, 3.0]
    assert call_reward_function(lambda asked: [float(len(asked))], requests(1)) == [1.0]
    assert call_reward_function(lambda asked: [], []) == []


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 1e39, 10**400, None, "1.0", b"", 1j, np.complex64(1), {}], ids=repr
)
def test_an_invalid_reward_is_named_with_its_index(bad):
    words = (
        r"reward 1 of 3, of the answer \(2, 1\) to the prompt \(1,\): it is .*, a finite number is required"
    )
    with pytest.raises(RewardError, match=words) as caught:
        call_reward_function(lambda _: [0.0, bad, math.nan], requests(3))
    assert repr(bad)[:200] in str(caught.value)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_another_number_of_rewards_is_an_error(count):
    with pytest.raises(RewardError, match=f"returned {count} rewards for 3 answers"):
        call_reward_function(lambda _: [0.0] * count, requests(3))


def raises(_: object) -> list[float]:
    raise KeyError("place")


@pytest.mark.parametrize(
    ("function", "says"), [(raises, "raised KeyError: 'place'"), (lambda _: None, "raised TypeError")]
)
def test_a_function_that_fails_is_named_by_its_error(function, says):
    with pytest.raises(RewardError, match=says):
        call_reward_function(function, requests(1))


def test_a_failure_has_the_traceback_of_the_function_from_its_first_line_on(tmp_path, monkeypatch):
    rule = "def rule(requests):\n    return parse('{')\n"
    text = f"import json\n\n{rule}\ndef parse(text):\n    return json.loads(text)\n"
    (tmp_path / "a_rule_that_raises.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    function = import_reward_function("a_rule_that_raises:rule")
    (failure,) = call_reward_function(function, requests(1), skip_failures=True)
    file = tmp_path / "a_rule_that_raises.py"
    assert failure.reason.endswith(f"({file}, line 7)")
    lines = failure.traceback.splitlines()
    assert lines[1] == f'  File "{file}", line 4, in rule'
    assert lines[-1].startswith("json.decoder.JSONDecodeError")


def test_a_function_that_exits_is_a_failure():
    with pytest.raises(RewardError, match="raised SystemExit: 0"):
        call_reward_function(lambda _: sys.exit(0), requests(1))


def test_a_module_that_raises_is_named_with_its_line_and_traceback(tmp_path, monkeypatch):
    (tmp_path / "a_module_that_raises.py").write_text("import math\n\nRATE = 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = (
        r"a_module_that_raises:rule cannot be imported: ZeroDivisionError.*a_module_that_raises.py, line 3\)"
    )
    with pytest.raises(RewardError, match=words) as error:
        import_reward_function("a_module_that_raises:rule")
    assert "RATE = 1 / 0" in error.value.traceback_text
    assert "importlib" not in error.value.traceback_text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("math", "is named module:function, 'math' is not"),
        ("math:", "is named module:function"),
        (":sqrt", "is named module:function"),
        ("no_such_module_at_all:f", "no_such_module_at_all:f cannot be imported"),
        ("math:no_such", "math has no function 'no_such'"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(name, says):
    with pytest.raises(RewardError, match=says):
        import_reward_function(name)


def test_a_function_of_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "a_rule_of_ours.py").write_text("def rule(requests):\n    return [1.0 for _ in requests]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert call_reward_function(import_reward_function("a_rule_of_ours:rule"), requests(2)) == [1.0, 1.0]


def test_numbers_of_answers_and_of_tokens_pass():
    assert call_reward_function(lambda _: [1, 0.5, [0.25, -1]], reward_requests()) == [1.0, 0.5, (0.25, -1.0)]


FAILURES = {
    "its own failure": (lambda _: [0.0, RewardFailure(reason="no judge"), 1.0], "no judge"),
    "tokens, too few": (lambda _: [0.0, [1.0], 1.0], "1 numbers for an answer of 2 tokens"),
    "tokens, one nan": (lambda _: [0.0, [1.0, math.nan], 1.0], "nan at token 1"),
}


@pytest.mark.parametrize(("function", "words"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_is_an_error_that_names_prompt_and_answer_or_is_returned(function, words):
    with pytest.raises(RewardError, match=r"reward 1 of 3, of the answer 'x+ … to the prompt 'question 1'"):
        call_reward_function(function, reward_requests())
    with pytest.raises(RewardError) as error:
        call_reward_function(function, reward_requests())
    assert words in str(error.value)
    assert len(str(error.value)) < 500
    first, failure, last = call_reward_function(function, reward_requests(), skip_failures=True)
    assert (first, last) == (0.0, 1.0)
    assert words in failure.reason


@pytest.mark.parametrize(
    ("function", "words"),
    [(lambda _: [1.0], "returned 1 rewards for 3 answers"), (lambda _: 1 / 0, "raised ZeroDivisionError")],
    ids=["wrong count", "raises"],
)
def test_a_failed_call_is_a_failure_of_each_answer(function, words):
    with pytest.raises(RewardError, match=words):
        call_reward_function(function, reward_requests())
    failures = call_reward_function(function, reward_requests(), skip_failures=True)
    assert [words in failure.reason for failure in failures] == [True] * 3


@pytest.mark.parametrize("answer", [{0: 5.0, 1: 5.0}, {0.25, 0.5}, {1: 2}.keys(), "ab", b"ab"], ids=repr)
def test_what_has_no_order_of_rewards_is_no_reward(answer):
    found = call_reward_function(lambda _: answer, requests(2), skip_failures=True)
    assert [type(one) for one in found] == [RewardFailure] * 2
    assert f"returned a {type(answer).__name__}, which is no list of one reward per answer" in found[0].reason
