"""The token ids of a record's prompt and answers, rendered, or taken as they were given."""

from glm_rlhf.engine.data.records.reading import RecordLocation
from glm_rlhf.engine.data.records.schema import Answer, Prompt, TokenIds
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer


def prompt_ids(prompt: Prompt, place: RecordLocation, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids a model is given before it answers.

    Args:
        prompt: turns, which are rendered with the generation prompt, or ids, which are used as they are.
        place: the record's, for errors.
        tokenizer: the model's; None where there is none, which is enough for ids.

    Raises:
        RecordError: turns the chat form does not know, or turns without a tokenizer.
    """
    if isinstance(prompt, TokenIds):
        return list(prompt.ids)
    try:
        return _required(tokenizer).render(prompt, add_generation_prompt=True)
    except ValueError as error:
        raise place.error(str(error)) from error


def answer_ids(answer: Answer, place: RecordLocation, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids a model is to write: a text with its header and end id, or ids as they were given.

    Raises:
        RecordError: a text without a tokenizer.
    """
    if isinstance(answer, TokenIds):
        return list(answer.ids)
    try:
        return _required(tokenizer).render_response(answer)
    except ValueError as error:
        raise place.error(str(error)) from error


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            "the record holds text, but no tokenizer is given; set tokenizer.path, or give token ids"
        )
    return tokenizer
