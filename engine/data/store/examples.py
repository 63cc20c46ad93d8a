"""Records of a store as the sequences that a model is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from glm_rlhf.engine.data.store.token_store import TokenStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence: a prompt and an answer to it."""

    tokens_T: torch.Tensor
    """Ids of both, int64 [T]."""
    num_prompt: int
    """How many of them are the prompt's."""


class Records(Protocol):
    """Records by number, from 0, each of which is one or several sequences."""

    def __len__(self) -> int:
        """Return how many there are."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each record sends through a model, int64 [n]."""

    def examples(self, number: int) -> tuple[Example, ...]:
        """Return the sequences of one record."""

    def name(self, number: int) -> str:
        """Return what to call a record when it is at fault."""


class Demonstrations:
    """Prompts with the answer to imitate: one sequence a record."""

    def __init__(self, store: TokenStore, path: str) -> None:
        self.store, self.path = store, path
        self.lengths = store.lengths

    def __len__(self) -> int:
        return len(self.store)

    def examples(self, number: int) -> tuple[Example]:
        """Return the prompt with its answer."""
        return (_joined(self.store.prompt(number), self.store.response(number)),)

    def name(self, number: int) -> str:
        """Return the record's place in its file."""
        return f"record {self.store.record_index(number)} of {self.path}"


class Pairs:
    """Prompts with two answers: the sequence of the chosen one, then that of the other."""

    def __init__(self, store: TokenStore, path: str, kept: Sequence[int] | None = None) -> None:
        """Take a store's pairs.

        Args:
            store: of pairs.
            path: the file they come from.
            kept: the pairs of the store that count, in order; all when None.
        """
        self.store, self.path = store, path
        self.kept = np.arange(len(store)) if kept is None else np.asarray(kept, dtype=np.int64)
        self.lengths = store.lengths[self.kept]

    def __len__(self) -> int:
        return len(self.kept)

    def examples(self, number: int) -> tuple[Example, Example]:
        """Return the prompt with the chosen answer, and with the other."""
        place = int(self.kept[number])
        prompt = self.store.prompt(place)
        return _joined(prompt, self.store.chosen(place)), _joined(prompt, self.store.rejected(place))

    def name(self, number: int) -> str:
        """Return the record's place in its file."""
        return f"record {self.store.record_index(int(self.kept[number]))} of {self.path}"


def _joined(prompt: np.ndarray, answer: np.ndarray) -> Example:
    tokens_T = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64))
    return Example(tokens_T=tokens_T, num_prompt=len(prompt))
