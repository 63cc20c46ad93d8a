"""Prompts of a file, as the stages that answer and judge them want them."""

from functools import partial
from typing import Literal

from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.data.records.schema import PromptRecord, read_prompts
from glm_rlhf.engine.data.records.token_ids import prompt_ids
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.spec.model_config import GLMConfig


def read_prompt_inputs(
    path: str,
    tokenizer: Tokenizer | None,
    glm: GLMConfig,
    *,
    max_prompt_tokens: int,
    on_error: Literal["raise", "skip"],
    report: ReadReport,
) -> list[PromptInput]:
    """Return the prompts of a file in its order, each of which leaves room for an answer.

    Args:
        path: a file of prompts.
        tokenizer: for those that are texts; None where there is none.
        glm: shape of the model that answers.
        max_prompt_tokens: a longer one is a bad record.
        on_error: what a bad record does: raise, or be skipped and counted.
        report: counts.

    Raises:
        RecordError: a bad file or record.
    """
    then = partial(
        _prompt_input,
        tokenizer=tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        max_positions=glm.max_positions,
    )
    return list(read_prompts(path, vocab_size=glm.vocab_size, on_error=on_error, report=report, then=then))


def _prompt_input(
    record: PromptRecord, *, tokenizer: Tokenizer | None, max_prompt_tokens: int, max_positions: int
) -> PromptInput:
    ids = prompt_ids(record.prompt, record.location, tokenizer)
    longest = min(max_prompt_tokens, max_positions - 1)
    if len(ids) > longest:
        raise record.location.error(
            f"the prompt has {len(ids)} tokens, at most {longest} are allowed: data.max_prompt_tokens is "
            f"{max_prompt_tokens}, the model's context {max_positions}"
        )
    return PromptInput(tokens=tuple(ids), extra=record.extra, record=record.location.index)
