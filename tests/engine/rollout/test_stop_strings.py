"""Stop texts: found wherever tokens happen to cut them, and nowhere else."""

from pathlib import Path

import pytest

from glm_rlhf.engine.data.tokenizer.load import load_tokenizer
from glm_rlhf.engine.rollout.stop_strings import stop_check


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Path(__file__).parents[3] / "examples" / "tiny_tokenizer")


def first_end(check, tokens):
    """Number of tokens after which an answer ends, None for never."""
    return next((count for count in range(1, len(tokens) + 1) if check(tokens[:count])), None)


@pytest.mark.parametrize("stop", ["3 = 5", "答案", "龘", "question", "\n"])
def test_an_answer_ends_with_the_token_that_completes_a_text(tokenizer, stop):
    tokens = tokenizer.encode(f"The sum: 2 + {stop} and more 答 of 3 = 4")
    ended = first_end(stop_check(["<never>", stop], tokenizer), tokens)
    assert ended is not None
    assert stop in tokenizer.decode(tokens[:ended], unknown="replace")
    assert stop not in tokenizer.decode(tokens[: ended - 1], unknown="replace")


def test_a_text_that_does_not_come_ends_nothing(tokenizer):
    tokens = tokenizer.encode("The answer is not known. 3 = 4, 答")
    assert first_end(stop_check(["3 = 5", "答案"], tokenizer), tokens) is None


def test_no_texts_are_no_check_and_need_no_tokenizer():
    assert stop_check([], None) is None
    with pytest.raises(ValueError, match=r"generation\.stop holds texts, but the model has no tokenizer"):
        stop_check(["x"], None)
