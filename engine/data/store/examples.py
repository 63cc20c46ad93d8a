"""The records of a store as sequences to train on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from glm_rlhf.engine.data.store.token_store import TokenStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence: a prompt and its answer."""

    tokens_T: torch.Tensor
    """Token ids of both, int64 [T]."""
    num_prompt: int
    """Number of prompt tokens."""


class Records(Protocol):
    """Records numbered from 0; each is one or several sequences."""

    def __len__(self) -> int:
        """Return the number of records."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each record over all its sequences, int64 [n]."""

    @property
    def digest(self) -> str:
        """Checksum of the ids of all sequences, in order; equal for equal content, wherever it was read."""

    def examples(self, number: int) -> tuple[Example, ...]:
        """Return the sequences of one record."""

    def name(self, number: int) -> str:
        """Return the name of a record for messages."""


class Demonstrations:
    """Prompts with the answer to train on: one sequence per record."""

    def __init__(self, store: TokenStore, path: str) -> None:
        self.store, self.path = store, path
        self.lengths, self.digest = store.lengths, store.digest

    def __len__(self) -> int:
        return len(self.store)

    def examples(self, number: int) -> tuple[Example]:
        """Return the prompt with its answer."""
        return (_joined(self.store.prompt(number), self.store.response(number)),)

    def name(self, number: int) -> str:
        """Return the record's index and file."""
        return f"record {self.store.record_index(number)} of {self.path}"


class Pairs:
    """Prompts with two answers: the sequence of the chosen answer, then that of the rejected one."""

    def __init__(self, store: TokenStore, path: str, kept: Sequence[int] | None = None) -> None:
        """Select pairs of a store.

        Args:
            store: a store of pairs.
            path: the file of the pairs.
            kept: indices of the pairs to use, in order; None: all.
        """
        self.store, self.path = store, path
        self.kept = np.arange(len(store)) if kept is None else np.asarray(kept, dtype=np.int64)
        self.lengths = store.lengths[self.kept]
        chosen = hashlib.blake2b(store.digest.encode(), digest_size=16)
        chosen.update(np.ascontiguousarray(self.kept).tobytes())
        self.digest = chosen.hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def examples(self, number: int) -> tuple[Example, Example]:
        """Return the prompt with the chosen answer, and with the rejected one."""
        stored = int(self.kept[number])
        prompt = self.store.prompt(stored)
        return _joined(prompt, self.store.chosen(stored)), _joined(prompt, self.store.rejected(stored))

    def name(self, number: int) -> str:
        """Return the record's index and file."""
        return f"record {self.store.record_index(int(self.kept[number]))} of {self.path}"


def _joined(prompt: np.ndarray, answer: np.ndarray) -> Example:
    tokens_T = torch.from_numpy(np.concatenate((prompt, answer)).astype(np.int64))
    return Example(tokens_T=tokens_T, num_prompt=len(prompt))
