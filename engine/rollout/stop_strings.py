"""Texts that end an answer."""

from collections.abc import Callable, Sequence

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer

StopCheck = Callable[[Sequence[int]], bool]
"""Says of an answer's tokens so far whether it ends here."""


def stop_check(texts: Sequence[str], tokenizer: Tokenizer | None) -> StopCheck | None:
    """Return what says whether an answer's newest tokens complete one of the texts; None without texts.

    Raises:
        ValueError: texts, but no tokenizer.
    """
    if not texts:
        return None
    if tokenizer is None:
        raise ValueError(
            "generation.stop holds texts, but the model has no tokenizer: give generation.stop_ids"
        )
    # A text of n bytes is spread over at most n tokens, and one more may have ended inside a character.
    window = max(len(text.encode()) for text in texts) + 1

    def ends(tokens: Sequence[int]) -> bool:
        newest = tokenizer.decode(tokens[-window:], unknown="replace")
        return any(text in newest for text in texts)

    return ends
