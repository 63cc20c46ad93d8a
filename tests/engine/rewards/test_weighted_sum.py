"""Weighted sums of reward functions, parsed from text."""

import pytest
from reward_requests import reward_requests

from glm_rlhf.engine.rewards.function import (
    RewardError,
    RewardFailure,
    call_reward_function,
    import_reward_function,
)
from glm_rlhf.engine.rewards.weighted_sum import RewardSum, RewardTerm, parse_reward_function


def over_http(url: str):
    """A server whose reward is the length of its address."""
    return lambda requests: [float(len(url))] * len(requests)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reward_rules:share_of_low_ids", 0.5),
        ("http://judge", 12.0),
        ("2 * reward_rules:share_of_low_ids", 1.0),
        ("reward_rules:share_of_low_ids + -0.5 * https://judge", 0.5 - 6.5),
        ("reward_rules:low_id_tokens", (1.0, 0.0)),
        ("2*reward_rules:low_id_tokens + reward_rules:share_of_low_ids", (2.0, 0.5)),
        ("reward_rules:low_id_tokens + 1e1 * reward_rules:low_id_tokens", (11.0, 0.0)),
    ],
)
def test_a_text_names_a_weighted_sum(text, expected):
    function = parse_reward_function(text, over_http=over_http, by_name=import_reward_function)
    assert (
        call_reward_function(function, reward_requests()) == [expected] * 3
    )  # ids 4 and 55, of which one is below 48


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:b + ",
        "a:b+c:d",
        "1.2.3 * reward_rules:low_id_tokens",
        "reward_rules",
        "x * y:z",
        "1e400 * reward_rules:low_id_tokens",
    ],
)
def test_another_form_is_an_error(text):
    with pytest.raises(RewardError):
        parse_reward_function(text, over_http=over_http, by_name=import_reward_function)


def test_a_failure_of_one_term_is_a_failure_of_the_sum_and_named():
    terms = (
        RewardTerm(name="good", weight=1.0, function=lambda requests: [1.0] * len(requests)),
        RewardTerm(name="bad", weight=0.5, function=lambda requests: [2.0, None, 2.0]),
    )
    first, failure, last = call_reward_function(RewardSum(terms=terms), reward_requests(), skip_failures=True)
    assert (first, last) == (2.0, 2.0)
    assert failure == RewardFailure(reason="of bad: it is None, a finite number is required")
