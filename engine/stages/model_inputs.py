"""What commands on a model have in common: its layout, its tokenizer, the ids that end an answer."""

import json
from pathlib import Path
from typing import Protocol

import torch

from glm_rlhf.engine.config import (
    GenerationSection,
    ModelSection,
    ParallelSection,
    RunSection,
    TokenizerSection,
)
from glm_rlhf.engine.data.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.tokenizer import has_tokenizer, load_tokenizer
from glm_rlhf.parallel.glm_config import GLMConfig
from glm_rlhf.parallel.layout import Layout

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types by the names that configs use."""


class ReadsText(Protocol):
    """A root config of a command whose model may have a tokenizer."""

    tokenizer: TokenizerSection
    """What the user says about it."""
    tokenizer_path: Path
    """Where it is looked for."""


class DrawsAnswers(Protocol):
    """A root config of a command whose model answers prompts."""

    run: RunSection
    """Names the seed of everything."""
    generation: GenerationSection
    """May name another for answers, and ids that end them."""
    model: ModelSection
    """The model."""


def answer_seed(config: DrawsAnswers) -> int:
    """Return the seed that answers follow from."""
    return config.run.seed if config.generation.seed is None else config.generation.seed


def layout_of(axes: ParallelSection) -> Layout:
    """Return the layout that a config asks for."""
    return Layout(tp=axes.tp, pp=axes.pp, vpp=axes.vpp, cp=axes.cp, sequence_parallel=axes.sequence_parallel)


def find_tokenizer(config: ReadsText, glm: GLMConfig) -> Tokenizer | None:
    """Return the tokenizer, or None where none is named and none lies beside the model: ids need none.

    Raises:
        ValueError: a damaged tokenizer, or one with more ids than the model has rows.
    """
    folder = config.tokenizer_path
    if config.tokenizer.path is None and not has_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > glm.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model's embedding only "
            f"{glm.vocab_size} rows: they do not belong together"
        )
    return tokenizer


def stop_ids_of(config: DrawsAnswers, tokenizer: Tokenizer | None, glm: GLMConfig) -> frozenset[int]:
    """Return the ids that end an answer: the model's own, and those that the config adds.

    Raises:
        ValueError: the config adds one that the model cannot draw.
    """
    given = config.generation.stop_ids
    if beyond := [token for token in given if token >= glm.vocab_size]:
        raise ValueError(
            f"generation.stop_ids holds {beyond[0]}, the model's vocabulary ends at {glm.vocab_size - 1}: no "
            "answer would end so"
        )
    return frozenset(given) | _own_stop_ids(config.model.path, tokenizer)


def _own_stop_ids(folder: str | Path, tokenizer: Tokenizer | None) -> set[int]:
    """Return the ids that end a model's answers: the tokenizer's, without one those of config.json."""
    if tokenizer is not None:
        return set(tokenizer.stop_ids)
    declared = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return set(declared) if isinstance(declared, list) else set() if declared is None else {declared}
