"""Token ids of a record's prompt and answers: rendered from text, or the record's own ids."""

from glm_rlhf.engine.data.records.reading import RecordLocation
from glm_rlhf.engine.data.records.schema import Answer, Prompt, TokenIds
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer


def prompt_ids(prompt: Prompt, location: RecordLocation, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids of a prompt.

    Args:
        prompt: turns, which are rendered with the generation prompt, or ids, which are used unchanged.
        location: of the record, for errors.
        tokenizer: of the model; None is enough for ids.

    Raises:
        RecordError: turns that the chat format does not have, or turns without a tokenizer.
    """
    if isinstance(prompt, TokenIds):
        return list(prompt.ids)
    try:
        return _required(tokenizer).render(prompt, add_generation_prompt=True)
    except ValueError as error:
        raise location.error(str(error)) from error


def answer_ids(answer: Answer, location: RecordLocation, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids of an answer: of its text with header and end id, or its ids unchanged.

    Raises:
        RecordError: a text without a tokenizer.
    """
    if isinstance(answer, TokenIds):
        return list(answer.ids)
    try:
        return _required(tokenizer).render_response(answer)
    except ValueError as error:
        raise location.error(str(error)) from error


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            "the record holds text, but there is no tokenizer; set tokenizer.path, or give token ids"
        )
    return tokenizer
