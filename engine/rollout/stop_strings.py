"""Texts that end an answer."""

from collections.abc import Callable, Sequence

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer

StopCheck = Callable[[Sequence[int]], bool]
"""Returns whether an answer ends with its tokens so far."""


def stop_check(texts: Sequence[str], tokenizer: Tokenizer | None) -> StopCheck | None:
    """Return a check of whether an answer's newest tokens complete one of the texts; None without texts.

    Raises:
        ValueError: texts without a tokenizer.
    """
    if not texts:
        return None
    if tokenizer is None:
        raise ValueError(
            "generation.stop holds texts, but the model has no tokenizer: give generation.stop_ids"
        )
    # A text of n bytes is in at most n tokens; one more may begin inside a character.
    window = max(len(text.encode()) for text in texts) + 1

    def ends(tokens: Sequence[int]) -> bool:
        newest = tokenizer.decode(tokens[-window:], unknown="replace")
        return any(text in newest for text in texts)

    return ends
